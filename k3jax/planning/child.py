# SPDX-License-Identifier: Apache-2.0
"""One program lowered, compiled and costed: `python -m k3jax.planning.child FOLDER`.

Reads request.json of the folder and writes result.json; see `k3jax.planning.compiler`.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

from k3jax.planning.bundles import read_schedules
from k3jax.planning.chips import parse_slice
from k3jax.planning.compiler import REQUEST, RESULT, SCHEDULES, Compiled, Memory
from k3jax.planning.cost import estimate
from k3jax.planning.hlo import parse_hlo
from k3jax.planning.programs import Work, lower
from k3jax.sharding import make_mesh


def main(folder: Path) -> None:
    request = json.loads((folder / REQUEST).read_text())
    try:
        result = compile_program(request, folder).to_json()
    except Exception as error:
        if not _from_compiler(error):
            raise
        text = " ".join(str(error).split())
        full = "RESOURCE_EXHAUSTED" in text
        result = {"out_of_memory" if full else "error": _beginning(text)}
    (folder / RESULT).write_text(json.dumps(result))


def compile_program(request: dict, folder: Path) -> Compiled:
    work, where = Work.from_json(request["work"]), parse_slice(request["topology"])
    spec = ",".join(f"{axis}={size}" for axis, size in work.mesh.items())
    lowered = lower(request["program"], work, make_mesh(spec, where.devices()))
    start = time.monotonic()
    compiled = lowered.compile()
    seconds = time.monotonic() - start
    module = parse_hlo(optimised_hlo(lowered, compiled, folder))
    stats = compiled.memory_analysis()
    memory = Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )
    cost = estimate(module, where.chip, read_schedules(folder / SCHEDULES))
    return Compiled(memory, cost, seconds, f"jax {version('jax')}, libtpu {version('libtpu')}")


def optimised_hlo(lowered, compiled, folder: Path) -> str:
    """The text of a compiled program.

    A few programs cannot be turned into text after the fact; they are compiled once more, with the
    compiler writing it down itself.
    """
    try:
        return compiled.as_text()
    except Exception as error:
        if not _from_compiler(error):
            raise
    dumped = folder / "hlo"
    lowered.compile(compiler_options={"xla_dump_to": str(dumped)})
    return max(dumped.glob("*after_codegen.txt"), key=lambda path: path.stat().st_size).read_text()


def _beginning(text: str, limit: int = 200) -> str:
    """The first sentences of what the compiler says; lists of its buffers follow."""
    text = text.partition("RESOURCE_EXHAUSTED: ")[2] or text
    sentences = text.split(". ")
    kept = sentences[0]
    for sentence in sentences[1:]:
        if len(kept) + len(sentence) > limit:
            break
        kept += f". {sentence}"
    return kept[:limit].rstrip(". ")


def _from_compiler(error: Exception) -> bool:
    """XLA's own error, which JAX only lets know by its name."""
    return type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
