# SPDX-License-Identifier: Apache-2.0
"""A reader of optimised HLO as text: computations, instructions, and the memory that they move.

Optimised HLO is what XLA:TPU ends with: each instruction of the entry computation is a kernel, a
transfer, or control flow; a kernel that was fused has its own computation (`calls=`). Arrays that
live in VMEM have S(1) in their layout, those in HBM have no S.
"""

import functools
import math
import re
from dataclasses import dataclass, field
from typing import Any


BYTES = {
    **dict.fromkeys(("s4", "u4"), 0.5),
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2", "f8e4m3b11fnuz"), 1),
    **dict.fromkeys(("s16", "u16", "bf16", "f16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
}
"""Size of an element. Other types (token, opaque) take no memory."""

SLICES = {"dynamic-slice", "slice", "gather"}
"""They read as much as they return, however large what they read from."""
VIEWS = {"bitcast", "get-tuple-element"}


@dataclass(frozen=True)
class Array:
    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool

    @property
    def bytes(self) -> float:
        return BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class Instruction:
    """`%name = type op(operands), attributes`.

    Attributes:
        arguments: the text between the brackets.
        attributes: the text after them.
        arrays: of the result, tuples flattened.
    """

    name: str
    type: str
    op: str
    arguments: str
    attributes: str
    root: bool

    @functools.cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)

    @functools.cached_property
    def arrays(self) -> list[Array]:
        return parse_arrays(self.type)

    @functools.cached_property
    def called(self) -> list[str]:
        """The computations that it names, in the order of the text."""
        one = r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
        found = re.findall(one, self.attributes)
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        return found + re.findall(r"%([\w.\-]+)", branches[1] if branches else "")

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None


@dataclass
class Computation:
    name: str
    instructions: list[Instruction] = field(default_factory=list)

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def root(self) -> Instruction:
        return next((i for i in self.instructions if i.root), self.instructions[-1])

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for operand in set(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return found

    def parameter(self, number: int) -> Instruction | None:
        for i in self.instructions:
            if i.op == "parameter" and i.arguments == str(number):
                return i
        return None


@dataclass
class Module:
    """A program: its computations by name, and the name of the one that runs."""

    computations: dict[str, Computation]
    entry: str
    cache: dict[tuple, Any] = field(default_factory=dict)
    """Results by function and computation, which are needed again and again."""

    def hbm_bytes(self, instruction: Instruction, computation: Computation) -> float:
        """What a kernel reads from HBM and writes to it; of a large operand only what it slices."""
        total = self._written(instruction)
        for number, name in enumerate(instruction.operands):
            operand = computation.by_name.get(name)
            if operand is None or name in instruction.operands[:number]:
                continue
            size = sum(array.bytes for array in operand.arrays if array.in_hbm)
            if size:
                total += min(size, self._read(instruction, number, size))
        return total

    def operations(self, name: str) -> set[str]:
        """The opcodes in a computation and in those that it calls."""
        found = set()
        for instruction in self.computations[name].instructions:
            found.add(instruction.op)
            for called in instruction.called:
                found |= self.operations(called)
        return found

    def identity(self, instruction: Instruction, computation: Computation) -> str:
        """Equal for kernels that compute the same from the same shapes, whatever their names."""
        types = [
            computation.by_name[n].type for n in instruction.operands if n in computation.by_name
        ]
        bodies = [self._text_of(name) for name in instruction.called]
        return "|".join(
            [instruction.op, *(_anywhere(t) for t in [instruction.type, *types]), *bodies]
        )

    def _read(self, user: Instruction, number: int, size: float) -> float:
        """Bytes that `user` reads of its operand `number`, which has `size` bytes."""
        if user.op in SLICES and number == 0:
            return sum(array.bytes for array in user.arrays)
        if user.op == "dynamic-update-slice" and number == 0:
            return 0  # written in place
        if user.op != "fusion":
            return size
        inside = self.computations[user.called[0]]
        parameter = inside.parameter(number)
        return size if parameter is None else self._read_of(inside, parameter, size)

    def _read_of(self, inside: Computation, value: Instruction, size: float) -> float:
        total = 0.0
        for user in inside.users.get(value.name, []):
            if user.op in VIEWS:
                total += self._read_of(inside, user, size)
            else:
                total += self._read(user, user.operands.index(value.name), size)
        return min(total, size)

    def _written(self, instruction: Instruction) -> float:
        if instruction.op == "dynamic-update-slice":
            return self._updated(instruction, None)
        arrays = [array for array in instruction.arrays if array.in_hbm]
        size = sum(array.bytes for array in arrays)
        if instruction.op != "fusion" or len(instruction.arrays) != 1:
            return size
        inside = self.computations[instruction.called[0]]
        root = inside.root
        while root.op in VIEWS and root.operands:
            root = inside.by_name[root.operands[0]]
        return self._updated(root, inside) if root.op == "dynamic-update-slice" and size else size

    def _updated(self, update: Instruction, inside: Computation | None) -> float:
        where = inside or next(c for c in self.computations.values() if update.name in c.by_name)
        return sum(array.bytes for array in where.by_name[update.operands[1]].arrays)

    def _text_of(self, name: str) -> str:
        if ("text", name) not in self.cache:
            computation = self.computations[name]
            number = {i.name: n for n, i in enumerate(computation.instructions)}
            lines = []
            for i in computation.instructions:
                refers = ",".join(str(number.get(operand, operand)) for operand in i.operands)
                literal = "" if i.operands else i.arguments
                attributes = re.split(r", (?:metadata|backend_config)=", i.attributes)[0]
                attributes = re.sub(r"(calls|to_apply)=%?[\w.\-]+", "", attributes)
                below = "".join(self._text_of(called) for called in i.called)
                lines.append(f"{_anywhere(i.type)} {i.op}({refers}{literal}){attributes}{below}")
            self.cache["text", name] = str(hash("\n".join(lines)))
        return self.cache["text", name]


def parse_hlo(text: str) -> Module:
    """The module of an optimised HLO text.

    Raises:
        ValueError: no entry computation in it.
    """
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in text.splitlines():
        if line[:1] in ("%", "E") and line.endswith("{"):
            name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)[1]
            current = computations.setdefault(name, Computation(name))
            entry = name if line.startswith("ENTRY") else entry
        elif current is not None and (found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", line)):
            current.instructions.append(_instruction(found[2], found[3], bool(found[1])))
    if entry is None:
        raise ValueError("the HLO text has no ENTRY computation.")
    return Module(computations, entry)


def parse_arrays(text: str) -> list[Array]:
    """The arrays of a type such as "(f32[2,3]{1,0:T(8,128)S(1)}, u32[])"."""
    found = re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", text)
    return [
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), "S(" not in layout)
        for dtype, shape, layout in found
        if dtype in BYTES
    ]


def _instruction(name: str, text: str, root: bool) -> Instruction:
    end = _end(text, " ")
    op, _, rest = text[end + 1 :].partition("(")
    close = _end(rest, ")")
    return Instruction(name, text[:end], op, rest[:close], rest[close + 1 :], root)


def _end(text: str, stop: str) -> int:
    """Index of the first `stop` outside of brackets."""
    depth = 0
    for index, letter in enumerate(text):
        if letter == stop and depth == 0:
            return index
        depth += (letter in "([{") - (letter in ")]}")
    return len(text)


def _anywhere(type_: str) -> str:
    """A type without its memory space."""
    return re.sub(r"S\(\d+\)", "", type_)
