# SPDX-License-Identifier: Apache-2.0
"""Makes the stored HLO texts and schedules: `python tests/planning/make_stored.py` with libtpu.

Small programs, compiled by the real TPU compiler (libtpu 0.0.42.1, jax 0.10.2) for a v5e. Places in
the source code are taken out of the texts; of the schedule of a kernel, everything but what
`k3jax.planning.schedules` reads.
"""

import os
import re
import tempfile
from pathlib import Path


STORED = Path(__file__).parent / "stored"


def main(dump: Path) -> None:
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from k3jax.planning.chips import parse_slice
    from k3jax.sharding import make_mesh

    def struct(mesh, *shape, spec=()):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    def scan(x, weights):
        return jax.lax.scan(lambda x, w: (jax.nn.silu(x @ w), None), x, weights)[0]

    def convolution(x, kernel):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), [(1, 1), (1, 1)], dimension_numbers=dimensions
        )

    def mlp(x, up, down):
        return jax.nn.silu(x @ up) @ down

    def softmax(x):
        return jax.nn.softmax(x.astype(jnp.float32), axis=-1)

    one = make_mesh("data=1", parse_slice("v5e:1x1").devices())
    four = make_mesh("fsdp=2,tensor=2", parse_slice("v5e:2x2").devices())
    programs = {
        "scan": (scan, struct(one, 256, 512), struct(one, 6, 512, 512)),
        "softmax": (softmax, struct(one, 4096, 1024)),
        "convolution": (convolution, struct(one, 2, 64, 64, 128), struct(one, 3, 3, 128, 256)),
        "collectives": (
            mlp,
            struct(four, 512, 256, spec=("fsdp",)),
            struct(four, 256, 1024, spec=("fsdp", "tensor")),
            struct(four, 1024, 256, spec=("tensor", "fsdp")),
        ),
    }
    for name, (function, *arguments) in programs.items():
        before = set(dump.glob("*"))
        compiled = jax.jit(function).lower(*arguments).compile()
        (STORED / f"{name}.hlo.txt").write_text(without_places(compiled.as_text()))
        if name in ("scan", "softmax"):
            store_schedules(name, set(dump.glob("*")) - before)


def without_places(text: str) -> str:
    """Without tables of source files, metadata and the compiler's own settings."""
    text = re.sub(r"\n(FileNames|FunctionNames|FileLocations|StackFrames)\n(.+\n)*", "\n", text)
    text = re.sub(r" stack_frame_id=\d+|,? ?metadata=\{[^}]*\}", "", text)
    return re.sub(r",? ?backend_config=\{.*\}$", "", text, flags=re.MULTILINE)


def store_schedules(program: str, paths: set[Path]) -> None:
    folder = STORED / program
    folder.mkdir(exist_ok=True)
    for path in paths:
        found = re.fullmatch(r"\d+-(.*-\d+-final_bundles.txt)", path.name)
        if found and "schedule-analysis" not in path.name and "fusion" in path.name:
            lines = [bundle(line) for line in path.read_text().splitlines()]
            text = "\n".join(filter(None, lines)) + "\n"
            (folder / f"1-{found[1]}").write_text(text)


def bundle(line: str) -> str:
    """Address, tag, depth and what is said of loops."""
    found = re.match(r"(\s*(?:0x)?[0-9a-f]+\s+(?:[A-Z]{2})?\s*:\s*(?:>\s*)*\{)(.*)", line)
    if not found:
        return ""
    exits = re.findall(r"%\w+ = scmp\.[\w.]+ [^,]*, \d+ /\* loop exit test \*/", found[2])
    stages = re.findall(r"/\* phi copy[^*]*\*/", found[2])
    kept = "" if found[2].strip().startswith("}") else " ;; ".join(["", *exits, *stages])
    return f"{found[1]}{kept} }}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        from k3jax.planning.compiler import ENVIRONMENT
        from k3jax.planning.schedules import DUMP_FLAGS

        os.environ |= {**ENVIRONMENT, "LIBTPU_INIT_ARGS": DUMP_FLAGS.format(folder=folder)}
        STORED.mkdir(exist_ok=True)
        main(Path(folder))
