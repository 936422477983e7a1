# SPDX-License-Identifier: Apache-2.0
"""Collectives in a compiled program: which instructions hold one, and how many bytes it moves."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from k3jax.planning.hlo import Computation, Instruction, Module


COLLECTIVE = re.compile(
    r"(all-gather|all-reduce|reduce-scatter|(ragged-)?all-to-all|collective-(permute|broadcast))$"
)

RING = 2
"""Links of a chip in a ring over one axis of the slice: one to each neighbour."""


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind in one run of a program.

    Attributes:
        count: how often.
        bytes: of the larger of operands and results on each chip, summed over the collectives.
    """

    kind: str
    count: int
    bytes: float


class CollectivePart(NamedTuple):
    """The collective of an instruction: the instruction itself, or one inside a fusion."""

    kind: str
    instruction: Instruction
    inside: Computation

    @property
    def channel(self) -> str:
        """Equal for all fusions of one asynchronous collective."""
        return self.instruction.attribute(r"channel_id=(\d+)") or self.instruction.name


def find_collective(module: Module, i: Instruction, inside: Computation) -> CollectivePart | None:
    """What an instruction sends to other chips, if anything."""
    base = re.sub("-(start|done)$", "", i.op)
    if COLLECTIVE.match(base):
        return CollectivePart(base, i, inside)
    if base not in ("fusion", "async") or not i.called:
        return None
    key = "collective", i.called[0]
    if key not in module.cache:
        called = module.computations[i.called[0]]
        parts = (find_collective(module, inner, called) for inner in called.instructions)
        part = next(filter(None, parts), None)
        # A reduce-scatter is a fusion around an all-reduce.
        if part and called.name.startswith("all-reduce-scatter"):
            part = part._replace(kind="reduce-scatter")
        module.cache[key] = part
    return module.cache[key]


def channel_spans(module: Module, computation: Computation) -> dict[str, tuple[str, str]]:
    """Channel -> names of the first and the last instruction that work on its collective.

    XLA:TPU fuses an asynchronous collective with the kernels that run meanwhile: a fusion that
    starts it, fusions of a convolution and a part of it, and a fusion that ends it.
    """
    key = "channels", computation.name
    if key not in module.cache:
        spans: dict[str, tuple[str, str]] = {}
        for i in computation.instructions:
            if not i.op.endswith("-done") and (part := find_collective(module, i, computation)):
                spans[part.channel] = spans.get(part.channel, (i.name, ""))[0], i.name
        module.cache[key] = spans
    return module.cache[key]


def ring_passes(i: Instruction, kind: str) -> float:
    """How often what is on a chip crosses a link of the ring."""
    others = 1 - 1 / group_size(i)
    return {"all-reduce": 2 * others, "collective-permute": 1.0}.get(kind, others)


def payload(i: Instruction, inside: Computation) -> float:
    """Bytes on a chip: of the operands or the results, whichever is larger."""
    operands = [inside.by_name[name] for name in i.operands if name in inside.by_name]
    size_in = sum(array.bytes for operand in operands for array in operand.arrays)
    if i.op.endswith("-start"):  # its result holds the operands too
        size_out = max((array.bytes for array in i.arrays), default=0.0)
    else:
        size_out = sum(array.bytes for array in i.arrays)
    return max(size_in, size_out)


def group_size(i: Instruction) -> int:
    """Chips that take part together; 2 if unknown."""
    if groups := i.attribute(r"replica_groups=\{\{([\d,]+)\}"):
        return max(groups.count(",") + 1, 1)
    if size := i.attribute(r"replica_groups=\[\d+,(\d+)\]"):
        return int(size)
    sizes = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", i.attributes)
    if not sizes:
        return 2
    axes = dict(re.findall(r"'(\w+)'=(\d+)", sizes[1]))
    group = 1
    for axis in re.findall(r"'(\w+)'", sizes[2]):
        group *= int(axes[axis])
    return group
