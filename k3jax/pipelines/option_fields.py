# SPDX-License-Identifier: Apache-2.0
"""Options: dataclass fields with a check, a help text, a flag and a config key.

k3jax/pipelines/options.py and load_options.py define them. This file makes the signature and the
docstring of a method from them (`takes`), and lists them for flags (`option_fields`) and for
configs (`config_fields`).
"""

import dataclasses
import difflib
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args, get_origin

from k3jax.arguments import check_bool, check_choice, shown, whole_number


R = TypeVar("R")
Check = Callable[[Any, str], Any]
"""check(value, name) returns the value in its plain form, or raises ValueError with the name."""


@dataclass(frozen=True)
class Option:
    """One option, as flags, configs and docstrings need it.

    Attributes:
        name: of the argument in Python and of the config key.
        default: None where it depends on the checkpoint.
        annotation: its type in Python.
        check: converts a value; None passes without it where the default is None.
        text: sentences; the first one is the help of the flag.
        flag: as "-n --num-images N": names, and metavars of its values; empty: no flag.
        group: of the config key, as "generate"; None: no key.
        repeated: whether the flag may be given several times.
    """

    name: str
    default: Any
    annotation: Any
    check: Check
    text: str
    flag: str
    group: str | None
    repeated: bool

    @property
    def help(self) -> str:
        """One line, without the default."""
        return self.text.partition(". ")[0].removesuffix(".")

    @property
    def flags(self) -> tuple[str, ...]:
        return tuple(word for word in self.flag.split() if word.startswith("-"))

    @property
    def metavar(self) -> tuple[str, ...]:
        """One name for each value that the flag takes."""
        return tuple(word for word in self.flag.split() if not word.startswith("-"))

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that it can have, if these are few."""
        return _choices(self.annotation)

    @property
    def type(self) -> type:
        """int, float, bool or str: of one value on the command line and in configs."""
        return _scalar_type(self.annotation) or str

    @property
    def config_type(self) -> Any:
        """The type of the config key, without None."""
        if self.choices:
            return Literal[self.choices]
        return tuple[(self.type,) * len(self.metavar)] if len(self.metavar) > 1 else self.type

    def checked(self, value: Any) -> Any:
        """The value in its plain form.

        Raises:
            ValueError: one sentence with the name.
        """
        return None if value is None and self.default is None else self.check(value, self.name)


def option(
    default: Any,
    text: str,
    check: Check | None = None,
    flag: str = "",
    group: str | None = None,
    repeated: bool = False,
) -> Any:
    """A dataclass field with the attributes of `Option`.

    Args:
        check: by default that of the annotation, if this is a Literal, bool or int.
    """
    more = {"check": check, "text": text, "flag": flag, "group": group, "repeated": repeated}
    return dataclasses.field(default=default, metadata=more)


@dataclass(frozen=True, kw_only=True, eq=False)
class Options:
    """Base class of options: every value is checked and in its plain form.

    Raises:
        ValueError: one sentence on the value that is wrong.
    """

    order: ClassVar[str] = ""
    """Names of the arguments that come first where they are given by position."""
    advice: ClassVar[Mapping[str, str]] = {}
    """Arguments of diffusers that do not exist here -> what to do."""

    def __post_init__(self):
        for name, option in option_fields(type(self)).items():
            object.__setattr__(self, name, option.checked(getattr(self, name)))

    @classmethod
    def from_sources(cls, *sources: Any, **values: Any) -> Self:
        """Options from the attributes or keys of `sources` that have the name of an option.

        Args:
            sources: mappings or objects, such as groups of a config; the later wins. None leaves
                the default.
            values: win over all sources.
        """
        found = {}
        for source in sources:
            read = source.get if isinstance(source, Mapping) else functools.partial(_read, source)
            own = {name: read(name) for name in option_fields(cls)}
            found |= {name: value for name, value in own.items() if value is not None}
        return cls.from_call((), found | values)

    @classmethod
    def from_call(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Self:
        """Options from the arguments of a call; or from an object and what differs from it.

        Raises:
            TypeError: an argument that does not exist, or is given twice.
        """
        start, names = None, list(parameters(cls))
        if args and isinstance(args[0], Options):
            start, *args = args
            if type(start) is not cls:
                raise TypeError(f"this takes {cls.__name__}, not {type(start).__name__}.")
        if len(args) > len(names):
            raise TypeError(f"there are {len(args)} arguments by position, but only {len(names)}.")
        values = dict(zip(names, args, strict=False))
        for name in kwargs:
            if name not in names:
                raise TypeError(cls._unknown(name))
            if name in values:
                raise TypeError(f"{name} is given twice, by position and by name.")
        values |= kwargs
        return cls(**values) if start is None else dataclasses.replace(start, **values)

    @classmethod
    def _unknown(cls, name: str) -> str:
        if name in cls.advice:
            return f"{name} is not an argument of k3jax: {cls.advice[name]}."
        near = difflib.get_close_matches(name, option_fields(cls), n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(parameters(cls))}."
        return f"{shown(name)} is not an argument; {hint}"


@functools.cache
def option_fields(cls: type[Options]) -> dict[str, Option]:
    """Name -> `Option` of all options of a class, in the order of definition."""
    return {
        f.name: Option(
            name=f.name,
            default=f.default,
            annotation=f.type,
            **{**f.metadata, "check": f.metadata["check"] or _check_of(f.type)},
        )
        for f in dataclasses.fields(cls)
    }


def config_fields(group: str, *classes: type[Options]) -> list[tuple[str, Any, Any]]:
    """(name, type, default) of a group's config keys, for `dataclasses.make_dataclass`.

    The default is None where the classes differ in it.
    """
    found: dict[str, list[Option]] = {}
    for cls in classes:
        for name, option in option_fields(cls).items():
            if option.group == group:
                found.setdefault(name, []).append(option)
    fields = []
    for name, (option, *others) in found.items():
        default = option.default if all(o.default == option.default for o in others) else None
        hint = option.config_type | None if default is None else option.config_type
        fields.append((name, hint, default))
    return fields


def parameters(cls: type[Options]) -> dict[str, inspect.Parameter]:
    """Name -> parameter of a method that `takes` the options; by name alone without an `order`."""
    kind = "POSITIONAL_OR_KEYWORD" if cls.order else "KEYWORD_ONLY"
    options = option_fields(cls)
    return {
        name: inspect.Parameter(
            name,
            getattr(inspect.Parameter, kind),
            default=options[name].default,
            annotation=options[name].annotation,
        )
        for name in dict.fromkeys([*cls.order.split(), *options])
    }


def takes(options: type[Options]) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Decorates a method whose last parameter is an `options` object.

    Callers pass its fields, by name or in the order of `options.order`; or first an object, and by
    name what differs from it. The signature comes from the fields; so does the docstring, at the
    line OPTIONS.
    """

    def decorate(method: Callable[..., R]) -> Callable[..., R]:
        own = list(inspect.signature(method).parameters.values())[:-1]
        names = [parameter.name for parameter in own[1:]]

        @functools.wraps(method)
        def call(self, *args, **kwargs) -> R:
            args = [*args, *(kwargs.pop(name) for name in names[len(args) :] if name in kwargs)]
            first, rest = args[: len(names)], args[len(names) :]
            return method(self, *first, options.from_call(rest, kwargs))

        call.__signature__ = inspect.Signature([*own, *parameters(options).values()])
        call.__doc__ = (method.__doc__ or "").replace("OPTIONS", _docstring(options))
        return call

    return decorate


def _docstring(options: type[Options]) -> str:
    known, lines = option_fields(options), []
    for name in parameters(options):
        text = f"{name}: {known[name].text}."
        lines += textwrap.wrap(text.replace("..", "."), 88, subsequent_indent="    ")
    return "\n            ".join(lines)


def _read(source: Any, name: str) -> Any:
    return getattr(source, name, None)


def _choices(annotation: Any) -> tuple[str, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next(filter(None, map(_choices, get_args(annotation))), ())


def _scalar_type(annotation: Any) -> type | None:
    if annotation in (int, float, bool, str):
        return annotation
    if get_origin(annotation) is Literal:
        return str
    return next(filter(None, map(_scalar_type, get_args(annotation))), None)


def _check_of(annotation: Any) -> Check:
    if choices := _choices(annotation):
        return functools.partial(check_choice, choices=choices)
    return {bool: check_bool, int: whole_number}[_scalar_type(annotation)]
