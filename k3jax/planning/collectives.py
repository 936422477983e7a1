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


def find_collective(module: Module, i: Instruction, inside: Computation) -> CollectivePart | None:
    """What an instruction sends to other chips, if anything.

    A fusion may hold a collective and convolutions that run meanwhile: with weights or channels
    split over chips, XLA:TPU fuses the two.
    """
    base = re.sub("-(start|done)$", "", i.op)
    if COLLECTIVE.match(base):
        return CollectivePart(base, i, inside)
    if base not in ("fusion", "async"):
        return None
    for name in i.called:
        called = module.computations[name]
        for instruction in called.instructions:
            if part := find_collective(module, instruction, called):
                # A reduce-scatter is a fusion around an all-reduce.
                scatters = name.startswith("all-reduce-scatter")
                return part._replace(kind="reduce-scatter") if scatters else part
    return None


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
