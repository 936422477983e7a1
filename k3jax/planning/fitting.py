# SPDX-License-Identifier: Apache-2.0
"""Whether a batch fits, and the error that names the largest one that does.

Arithmetic comes first: weights and inputs that are larger than a chip's memory are refused without
compiling. What only the compiler can know is refused by it. Either way smaller batches are tried by
halving, so that the sentence can name one that fits.
"""

import dataclasses
import math
from collections.abc import Callable

from k3jax.planning.compiler import Compiled, OutOfMemory, size_text
from k3jax.planning.workload import (
    COMPONENT,
    DENOISER,
    TITLES,
    Name,
    PlanOptions,
    Work,
    input_bytes,
    weight_bytes,
)
from k3jax.sharding import mesh_sizes


Compile = Callable[[Name, Work], Compiled]
Say = Callable[[str], None]


class DoesNotFit(ValueError):
    """One sentence with the largest batch that fits.

    Attributes:
        largest: images on each chip, or None where not even one fits.
    """

    def __init__(self, message: str, largest: int | None):
        super().__init__(message)
        self.largest = largest


class Trial:
    """Whether a program fits at a batch, by arithmetic first."""

    def __init__(self, options: PlanOptions, compile_program: Compile, say: Say):
        self.options, self.compile, self.say = options, compile_program, say
        self.usable = options.where.chip.usable
        self.sizes = mesh_sizes(options.load.mesh, options.where.count)
        self.encoder_sizes = self.sizes
        if "encode" in options.parts:
            self.encoder_sizes = _encoder_sizes(options, self.sizes)
        self._weights = {
            name: weight_bytes(name, self.work("denoise", 1)) for name in sorted(DENOISER)
        }

    def work(self, name: Name, batch: int) -> Work:
        work = self.options.work(self.sizes, batch)
        if name != "encode" or self.encoder_sizes == self.sizes:
            return work
        parts = self.encoder_sizes["data"] * self.encoder_sizes["fsdp"]
        share = math.ceil(work.images / parts)
        return dataclasses.replace(work, mesh=self.encoder_sizes, batch=share)

    def other_weights(self, name: Name) -> int:
        """Bytes of weights on each chip that are not the program's own arguments."""
        if name == "encode":
            return 0
        return sum(size for part, size in self._weights.items() if part != COMPONENT[name])

    def arithmetic(self, name: Name, batch: int) -> str | None:
        """What weights and inputs take, where that is already too much."""
        work = self.work(name, batch)
        weights = weight_bytes(COMPONENT[name], work)
        needed = weights + input_bytes(name, work) + self.other_weights(name)
        if needed <= self.usable:
            return None
        of = f"{size_text(needed)} of the {size_text(self.usable)} of a chip"
        return f"weights and inputs alone take {of}"

    def __call__(self, name: Name, batch: int) -> tuple[Compiled | None, str]:
        """(the program, "") or (None, why not)."""
        if fault := self.arithmetic(name, batch):
            return None, fault
        self.say(f"compiling the {TITLES[name]} for {self.options.where.name}, batch {batch}")
        try:
            compiled = self.compile(name, self.work(name, batch))
        except OutOfMemory as error:
            self.say(f"the {TITLES[name]} does not fit at batch {batch}")
            return None, f"the compiler says: {error}"
        needed = compiled.memory.peak + self.other_weights(name)
        self.say(
            f"compiled the {TITLES[name]} in {compiled.seconds:.0f} s: {size_text(needed)} a chip"
        )
        if needed <= self.usable:
            return compiled, ""
        return None, (
            f"it takes {size_text(needed)} with the other weights in memory, of the "
            f"{size_text(self.usable)} of a chip"
        )


def largest_batch(
    trial: Trial, names: list[Name], failed: int, say: Say
) -> tuple[int | None, list[int]]:
    """The largest of failed/2, failed/4, ... 1 at which all programs fit, and those tried."""
    tried = []
    while (failed := failed // 2) >= 1:
        say(f"looking for the largest batch that fits: trying {failed}")
        tried.append(failed)
        if all(trial(name, failed)[0] is not None for name in names):
            return failed, tried
    return None, tried


def _encoder_sizes(options: PlanOptions, sizes: dict[str, int]) -> dict[str, int]:
    """The mesh of the text encoder."""
    count, chip = options.where.count, options.where.chip
    if options.load.encoder_mesh is not None:
        return mesh_sizes(options.load.encoder_mesh, count)

    def fits(mesh: dict[str, int]) -> bool:
        return weight_bytes("text_encoder", options.work(mesh, 1)) < chip.usable

    splits = (k for k in range(2, count + 1) if count % k == 0)
    meshes = ({"data": count // k, "fsdp": k, "tensor": 1} for k in splits)
    return sizes if fits(sizes) else next(filter(fits, meshes), sizes)


def weights_sentence(options: PlanOptions, name: Name, fault: str) -> str:
    """Not even one image fits, and nothing was compiled to find that out."""
    advice = f"split them with --mesh (for example data=-1,fsdp={min(4, options.where.count)})"
    if options.where.count == 1:
        advice = "take more chips, or a chip with more memory"
    if name == "encode":
        if not options.load.int8_text_encoder:
            advice += ", or halve its weights with --int8-text-encoder"
        advice += ", or leave it out with --programs denoise,decode"
    return (
        f"no batch fits {options.where.name} with --mesh {options.load.mesh}: for the "
        f"{TITLES[name]} {fault} at batch 1; {advice}."
    )


def batch_sentence(
    options: PlanOptions, name: Name, fault: str, largest: int | None, tried: list[int]
) -> str:
    where, words = options.where.name, ", ".join(map(str, tried))
    start = f"--batch {options.batch} does not fit {where}: for the {TITLES[name]} "
    start += fault.rstrip(". ")
    if largest is not None:
        return f"{start}; the largest batch that fits is {largest} images a chip (tried: {words})."
    tried_text = f" (tried: {words})" if tried else ""
    return (
        f"{start}; no smaller batch fits either{tried_text}: choose a smaller size, a mesh that "
        "splits the weights (--mesh data=-1,fsdp=4), or a chip with more memory."
    )
