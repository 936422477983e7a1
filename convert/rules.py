# SPDX-License-Identifier: Apache-2.0
"""An invertible table of parameter names, compiled both ways. Knows nothing about any model.

A row is three strings: PyTorch's name, ours, and an einops pattern for the axes. The parts of a
name that vary are in braces, see templates.py.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from k3jax.convert.arrays import permuted
from k3jax.convert.templates import Template, words_of


Shape = tuple[int, ...]

LINEAR = "o i -> i o"
CONV = "o i h w -> h w i o"
CONV_1X1_AS_LINEAR = "o i 1 1 -> i o"
CONV_TRANSPOSE = "i o h w -> h w i o"


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a checkpoint."""

    component: str
    text: str

    def __str__(self):
        return f"{self.component}: {self.text}"


class ConversionError(ValueError):
    """A checkpoint cannot be converted. `faults` holds all that was found; the message has five
    lines at most."""

    def __init__(self, message: str, faults: Iterable[Fault] = ()):
        self.faults = tuple(faults)
        shown = len(self.faults) if len(self.faults) <= 4 else 3
        lines = [message, *(f"  {fault}" for fault in self.faults[:shown])]
        if len(self.faults) > shown:
            lines.append(f"  and {len(self.faults) - shown} more.")
        super().__init__("\n".join(lines))


def raise_faults(faults: list[Fault], where: str) -> None:
    """Raises one ConversionError for all `faults`, or nothing when there are none."""
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise ConversionError(f"{where} cannot be converted, {count}:", faults)


@dataclass(frozen=True)
class Rule:
    """One row. `alias` marks a second PyTorch name of a tensor, never written on the way back."""

    torch: str
    jax: str
    layout: str | None = None
    alias: bool = False

    @cached_property
    def _axes(self) -> tuple[list[str], list[str]]:
        left, right = self.layout.split("->")
        return left.split(), right.split()

    def permutation(self, *, back: bool = False) -> Shape:
        """Order in which the named axes are taken; the 1-axes are left out."""
        source, target = self._axes[::-1] if back else self._axes
        named = [axis for axis in source if axis != "1"]
        return tuple(named.index(axis) for axis in target if axis != "1")

    def jax_shape(self, shape: Shape) -> Shape | None:
        """Our shape of a PyTorch tensor; None when the pattern does not fit it."""
        return self._moved(shape, back=False)

    def torch_shape(self, shape: Shape) -> Shape | None:
        """PyTorch's shape of one of our tensors; None when the pattern does not fit it."""
        return self._moved(shape, back=True)

    def _moved(self, shape, back):
        if self.layout is None:
            return tuple(shape)
        source, target = self._axes[::-1] if back else self._axes
        sizes = dict(zip(source, shape, strict=False))
        if len(source) != len(shape) or sizes.get("1", 1) != 1:
            return None
        if any(axis == "1" and size != 1 for axis, size in zip(source, shape, strict=True)):
            return None
        return tuple(1 if axis == "1" else sizes[axis] for axis in target)


def to_jax_array(rule: Rule, array: np.ndarray) -> np.ndarray:
    """Our contiguous array of a PyTorch tensor; same dtype, same bits."""
    return _moved_array(rule, array, back=False)


def to_torch_array(rule: Rule, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_jax_array`."""
    return _moved_array(rule, array, back=True)


def _moved_array(rule, array, back):
    if rule.layout is None:
        return np.ascontiguousarray(array).reshape(array.shape)
    shape = rule.torch_shape(array.shape) if back else rule.jax_shape(array.shape)
    if shape is None:
        raise ConversionError(f"{rule.torch}: shape {array.shape} does not fit {rule.layout!r}.")
    source = rule._axes[1] if back else rule._axes[0]
    named = [size for axis, size in zip(source, array.shape, strict=True) if axis != "1"]
    return permuted(array.reshape(named), rule.permutation(back=back)).reshape(shape)


@dataclass(frozen=True)
class ConversionStep:
    """One tensor's way: which tensor, by which row, to which leaf."""

    torch_name: str
    jax_name: str
    rule: Rule
    torch_shape: Shape
    jax_shape: Shape


@dataclass
class ConversionPlan:
    """A step for each tensor of one component, planned from names and shapes alone."""

    component: str
    steps: list[ConversionStep] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    """(alias, name): two names of one tensor, both in the file; their bytes must be equal."""
    faults: list[Fault] = field(default_factory=list)

    def add_fault(self, text: str) -> None:
        self.faults.append(Fault(self.component, text))


class Table:
    """Rows compiled both ways.

    Args:
        component: name used in error messages.
        rules: the rows.
        ignored: PyTorch templates of tensors that have no place in this component, with {*}.
        constants: values of names such as `last` in {last-n}.
    """

    def __init__(self, component: str, rules: Iterable[Rule], *, ignored=(), constants=None):
        self.component = component
        self.rules = tuple(rules)
        constants = constants or {}
        self._compiled = []
        for rule in self.rules:
            torch_words, jax_words = words_of(rule.torch), words_of(rule.jax)
            torch_side = Template(rule.torch, {**jax_words, **torch_words}, constants)
            jax_side = Template(rule.jax, {**torch_words, **jax_words}, constants)
            self._compiled.append((rule, torch_side, jax_side))
        self._ignored = [Template(text, {}, constants) for text in ignored]

    def ignores(self, torch_name: str) -> bool:
        return any(template.read(torch_name) is not None for template in self._ignored)

    def from_torch(self, name: str) -> list[tuple[Rule, str]]:
        """Rows that match a PyTorch name, with the name they give it: one when all is well."""
        read = ((rule, torch.read(name), jax) for rule, torch, jax in self._compiled)
        return [(rule, jax.write(values)) for rule, values, jax in read if values is not None]

    def from_jax(self, name: str) -> list[tuple[Rule, str]]:
        """Rows that match one of our names, with PyTorch's name; aliases are left out."""
        read = ((r, jax.read(name), torch) for r, torch, jax in self._compiled if not r.alias)
        return [(rule, torch.write(values)) for rule, values, torch in read if values is not None]

    def to_jax(self, found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> ConversionPlan:
        """Plans the conversion of a PyTorch state dict from names and shapes alone.

        Args:
            found: PyTorch name -> shape, as the file has them.
            expected: our name -> shape, as the model has them.

        Returns:
            A plan; its `faults` name every unknown, missing, doubled and misshapen tensor.
        """
        plan = ConversionPlan(self.component)
        filled: dict[str, ConversionStep] = {}
        matched, unknown = [], []
        for torch_name, shape in found.items():
            rows = self.from_torch(torch_name)
            if not rows:
                if not self.ignores(torch_name):
                    unknown.append(torch_name)
                    plan.add_fault(f"unknown tensor {torch_name} of shape {_text(shape)}.")
                continue
            if len(rows) > 1:
                templates = " and ".join(rule.torch for rule, _ in rows)
                plan.add_fault(f"{torch_name} fits more than one row of the table: {templates}.")
                continue
            matched.append((torch_name, tuple(shape), *rows[0]))
        if len(unknown) == len(found) > 0:
            plan.faults = [Fault(self.component, self._foreign(unknown[0], len(unknown)))]
            return plan
        # Second names come last, so that a tensor is filed under its first name when it has both.
        for torch_name, shape, rule, jax_name in sorted(matched, key=lambda row: row[2].alias):
            if jax_name in filled:
                first = filled[jax_name]
                if rule.alias and first.torch_shape == shape:
                    plan.duplicates.append((torch_name, first.torch_name))
                else:
                    plan.add_fault(
                        f"{first.torch_name} and {torch_name} are both {jax_name}, "
                        f"with shapes {_text(first.torch_shape)} and {_text(shape)}."
                    )
                continue
            step = ConversionStep(torch_name, jax_name, rule, shape, rule.jax_shape(shape))
            filled[jax_name] = step
            self._check(plan, step, expected)
            plan.steps.append(step)
        for jax_name in expected:
            if jax_name not in filled:
                names = " or ".join(name for _, name in self.from_jax(jax_name)) or "no known name"
                shape = _text(self._torch_shape(jax_name, expected[jax_name]))
                plan.add_fault(f"missing tensor {names} of shape {shape} (our {jax_name}).")
        return plan

    def _foreign(self, name: str, count: int) -> str:
        """The fault of a state dict without any known name, often because of a prefix."""
        text = f"none of its {count} tensors has a known name; the first is {name}"
        parts = name.split(".")
        for start in range(1, len(parts)):
            if self.from_torch(".".join(parts[start:])):
                return f"{text}: remove the prefix '{'.'.join(parts[:start])}.' from all names."
        return f"{text}."

    def _check(self, plan, step, expected):
        if step.jax_name not in expected:
            plan.add_fault(
                f"{step.torch_name} of shape {_text(step.torch_shape)} is {step.jax_name}, "
                "which a model of this configuration does not have."
            )
        elif step.jax_shape != tuple(expected[step.jax_name]):
            expected_shape = self._torch_shape(step.jax_name, expected[step.jax_name])
            plan.add_fault(
                f"{step.torch_name} ({step.jax_name}) has shape {_text(step.torch_shape)}; "
                f"the model has {_text(expected_shape)}."
            )

    def _torch_shape(self, jax_name, shape):
        for rule, _ in self.from_jax(jax_name):
            return rule.torch_shape(tuple(shape)) or tuple(shape)
        return tuple(shape)

    def to_torch(self, shapes: Mapping[str, Shape]) -> ConversionPlan:
        """Plans the way back for our names and shapes; faults name what has no PyTorch name."""
        plan = ConversionPlan(self.component)
        seen = {}
        for jax_name, shape in shapes.items():
            rows = self.from_jax(jax_name)
            if len(rows) != 1:
                plan.add_fault(f"{jax_name} has {len(rows) or 'no'} PyTorch names in this layout.")
                continue
            rule, torch_name = rows[0]
            torch_shape = rule.torch_shape(tuple(shape))
            if torch_shape is None or torch_name in seen:
                plan.add_fault(f"{jax_name} of shape {_text(shape)} has no place as {torch_name}.")
                continue
            seen[torch_name] = jax_name
            plan.steps.append(ConversionStep(torch_name, jax_name, rule, torch_shape, tuple(shape)))
        return plan


def under(torch_prefix: str, jax_prefix: str, rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rows of a block, below the name of the block."""
    return tuple(
        Rule(f"{torch_prefix}.{r.torch}", f"{jax_prefix}.{r.jax}", r.layout, r.alias) for r in rules
    )


def dense(torch_name: str, jax_name: str, layout: str) -> tuple[Rule, Rule]:
    """The two rows of a layer with weight and bias."""
    return (
        Rule(f"{torch_name}.weight", f"{jax_name}.kernel", layout),
        Rule(f"{torch_name}.bias", f"{jax_name}.bias"),
    )


def norm(torch_name: str, jax_name: str) -> tuple[Rule, Rule]:
    """The two rows of a normalisation with scale and bias."""
    return (
        Rule(f"{torch_name}.weight", f"{jax_name}.scale"),
        Rule(f"{torch_name}.bias", f"{jax_name}.bias"),
    )


def _text(shape) -> str:
    if shape is None:
        return "another rank"
    return f"({', '.join(map(str, shape))})" if math.prod(shape) or shape else "()"
