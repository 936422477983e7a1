# SPDX-License-Identifier: Apache-2.0
"""Compiles programs with libtpu, each in a process of its own.

libtpu reads its flags when it is loaded, takes gigabytes for a large program, and may crash. So
`compile_in_child` starts `python -m k3jax.planning.compiler FOLDER` (`main` below), which reads
request.json of a temporary folder and writes result.json. The schedules are dumped there too (a few
hundred MB at full size) and are removed with the folder.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from k3jax.planning.chips import Slice, parse_slice
from k3jax.planning.cost import Cost, estimate
from k3jax.planning.hlo import parse_hlo
from k3jax.planning.schedules import DUMP_FLAGS, read_schedules
from k3jax.planning.workload import Name, Work, lower
from k3jax.sharding import make_mesh


HEARTBEAT = 60.0  # seconds between two signs of life
REQUEST, RESULT, SCHEDULES = "request.json", "result.json", "schedules"

# There is no TPU: libtpu must neither ask the metadata server nor keep others from compiling.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    # A program for absent devices can be written to the cache but not read again.
    "JAX_ENABLE_COMPILATION_CACHE": "0",
}


class OutOfMemory(Exception):
    """A program does not fit a chip; the message is the compiler's."""


@dataclass(frozen=True)
class Memory:
    """Bytes on each chip.

    Attributes:
        arguments: weights and inputs, padded to tiles.
        outputs: results that take no argument's place.
        temporaries: the program's work space.
        code: the program itself.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int

    @property
    def peak(self) -> int:
        """All of them at once."""
        return self.arguments + self.outputs + self.temporaries + self.code


@dataclass(frozen=True)
class Compiled:
    """What is known of a compiled program.

    Attributes:
        seconds: that the compiler took.
        compiler: versions of jax and libtpu.
    """

    memory: Memory
    cost: Cost
    seconds: float
    compiler: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Compiled":
        return cls(
            **{
                **values,
                "memory": Memory(**values["memory"]),
                "cost": Cost.from_json(values["cost"]),
            }
        )


def check_libtpu() -> None:
    """Raises ImportError, in one sentence, where the TPU compiler is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            "planning needs the TPU compiler (libtpu), which runs on any Linux machine without a "
            "TPU: pip install 'k3jax[tpu]'."
        )


def compile_in_child(
    program: Name, work: Work, where: Slice, say: Callable[[str], None] = lambda text: None
) -> Compiled:
    """Compiles a program for a slice; takes minutes at full size.

    Args:
        say: called now and then while the compiler runs.

    Raises:
        OutOfMemory: the program does not fit a chip.
        ChildProcessError: one sentence: the compiler refused it for another reason, or crashed.
    """
    with tempfile.TemporaryDirectory(prefix="k3jax-plan-") as name:
        folder = Path(name)
        request = {"program": program, "work": work.to_json(), "topology": where.name}
        (folder / REQUEST).write_text(json.dumps(request))
        flags = DUMP_FLAGS.format(folder=folder / SCHEDULES)
        before = os.environ.get("LIBTPU_INIT_ARGS", "")
        environment = {
            **os.environ,
            **ENVIRONMENT,
            "LIBTPU_INIT_ARGS": f"{before} {flags}".strip(),
        }
        output, code = _run(
            [sys.executable, "-m", "k3jax.planning.compiler", name], environment, say
        )
        path = folder / RESULT
        if not path.exists():
            raise ChildProcessError(_crash(code, output))
        result = json.loads(path.read_text())
    if "out_of_memory" in result:
        raise OutOfMemory(result["out_of_memory"])
    if "error" in result:
        raise ChildProcessError(f"the TPU compiler refused the program: {result['error']}")
    return Compiled.from_json(result)


def _run(command: list[str], environment: dict[str, str], say) -> tuple[str, int]:
    """What the command said on stderr, and its exit code."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as noise:
        child = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=noise, stderr=noise
        )
        try:
            while True:
                try:
                    code = child.wait(HEARTBEAT)
                    break
                except subprocess.TimeoutExpired:
                    say(f"still compiling ({time.monotonic() - start:.0f} s)")
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        noise.seek(0)
        return noise.read(), code


def _crash(code: int, output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    last = f" (its last words: {lines[-1][:200]})" if lines else ""
    if code < 0:
        return (
            f"the TPU compiler crashed with {signal.Signals(-code).name}{last}; some shapes do "
            "this to libtpu 0.0.42: try another --batch."
        )
    return f"the TPU compiler ended with exit code {code}{last}."


def size_text(size: float) -> str:
    """Bytes, in powers of 1,000: "17.4 GB"."""
    for unit in ("B", "kB", "MB"):
        if abs(size) < 999.5:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def main(folder: Path) -> None:
    """What the child process does."""
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
    """The first sentences of the compiler's message; lists of its buffers follow."""
    text = text.partition("RESOURCE_EXHAUSTED: ")[2] or text
    sentences = text.split(". ")
    kept = sentences[0]
    for sentence in sentences[1:]:
        if len(kept) + len(sentence) > limit:
            break
        kept += f". {sentence}"
    return kept[:limit].rstrip(". ")


def _from_compiler(error: Exception) -> bool:
    """Whether an error is XLA's, which only its name shows."""
    return type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
