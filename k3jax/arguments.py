# SPDX-License-Identifier: Apache-2.0
"""Checks of single arguments: what is plain is converted, the rest is one sentence with its name.

Each check takes (value, name) and returns a plain Python or numpy value, or raises ValueError. No
JAX and no PyTorch is imported: arrays and tensors are known by their methods.
"""

import contextlib
import math
import operator
import sys
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np


MOST_WHOLE = 10**20
LONGEST_VALUE = 80  # characters of a value in a message
Dtype = Literal["bfloat16", "float32"]
HALF = ("float16", "fp16", "half")


def shown(value: Any) -> str:
    """A value for a message: its repr on one short line."""
    try:
        text = " ".join(repr(value).split())
    except Exception:
        text = f"an object of type {type(value).__name__}"
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def whole_number(value: Any, name: str, least: int | None = None) -> int:
    """A Python int from any kind of whole number: int, a numpy integer, 25.0, a 0-d array.

    Args:
        least: the smallest value allowed; None: any.

    Raises:
        ValueError: a fraction, a bool, a text, more than 20 digits, or less than `least`.
    """
    plain, number = _scalar(value), None
    if isinstance(plain, float | np.floating):
        number = int(plain) if float(plain).is_integer() else None
    elif not _is_no_number(plain):
        with contextlib.suppress(TypeError):
            number = operator.index(plain)
    if number is None or abs(number) >= MOST_WHOLE:
        limit = "" if number is None else " of at most 20 digits"
        raise ValueError(f"{name} is {shown(value)}; it must be a whole number{limit}.")
    if least is not None and number < least:
        raise ValueError(f"{name} is {shown(number)}; it must be {least} or more.")
    return number


def check_number(value: Any, name: str, least: float = -math.inf, most: float = math.inf) -> float:
    """A finite float from `least` to `most`.

    Raises:
        ValueError: anything else, NaN, infinity, texts and bools too.
    """
    plain, number = _scalar(value), math.nan
    if not _is_no_number(plain):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            number = float(plain)
    if not math.isfinite(number):
        raise ValueError(f"{name} is {shown(value)}; it must be a finite number.")
    if least <= number <= most:
        return number
    limits = f"between {least:g} and {most:g}" if most < math.inf else f"{least:g} or more"
    raise ValueError(f"{name} is {shown(value)}; it must be {limits}.")


def check_bool(value: Any, name: str) -> bool:
    """True or False."""
    value = _scalar(value)
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} is {shown(value)}; it must be True or False.")
    return bool(value)


def check_choice(value: Any, name: str, choices: Sequence[str]) -> str:
    """One of a few texts."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {shown(value)}; it must be one of {', '.join(choices)}.")
    return str(value)


def check_text(value: Any, name: str) -> str:
    """A string that can be printed; line breaks and tabs are allowed."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, not {type(value).__name__} ({shown(value)}).")
    for position, character in enumerate(value):
        if character not in "\n\r\t" and unicodedata.category(character) in ("Cc", "Cs"):
            raise ValueError(
                f"{name} has the control character U+{ord(character):04X} at position "
                f"{position}: remove it."
            )
    return str(value)


def check_texts(value: Any, name: str) -> str | list[str]:
    """One text or a list of them; their numbers count from 0."""
    if isinstance(value, str):
        return check_text(value, name)
    if not _is_list(value):
        raise ValueError(f"{name} is {shown(value)}; it must be a string or a list of strings.")
    if not len(value):
        raise ValueError(f"{name} is an empty list: give at least one.")
    return [check_text(text, f"{name} {number}") for number, text in enumerate(value)]


def check_texts_or_none(value: Any, name: str) -> str | list[str | None]:
    """As `check_texts`; in a list also None."""
    if not _is_list(value):
        return check_texts(value, name)
    found = list(enumerate(value))
    return [None if text is None else check_text(text, f"{name} {n}") for n, text in found]


def check_interval(value: Sequence[int], name: str, count: int) -> tuple[int, int]:
    """(first, last) of `count` steps numbered from 0, as Python ints.

    Raises:
        ValueError: not two whole numbers in this order, or outside of the steps.
    """
    try:
        first, last = (whole_number(number, name) for number in value)
    except (TypeError, ValueError):
        first, last = 0, -1
    if not 0 <= first <= last < count:
        raise ValueError(
            f"{name} is {shown(value)}; it must be two whole numbers, the first and the last step, "
            f"counted from 0: of {count} steps, within (0, {count - 1})."
        )
    return first, last


def check_dtype(value: Any, name: str) -> str:
    """ "bfloat16" or "float32", from such a text or from a dtype of numpy, JAX or PyTorch."""
    text = value if isinstance(value, str) else getattr(value, "__name__", None) or str(value)
    text = text.removeprefix("torch.")
    if text in get_args(Dtype):
        return text
    advice = " (half precision is bfloat16 here)" if text in HALF else ""
    raise ValueError(f"{name} is {shown(value)}; it must be bfloat16 or float32{advice}.")


def one_or_each(check: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    """A check of one value, or of each of several (list, tuple, array), which become a list."""

    def check_all(value: Any, name: str) -> Any:
        value = to_host(value)
        if not _is_list(value):
            return check(value, name)
        if not len(value):
            raise ValueError(f"{name} is an empty list: give at least one.")
        return [check(one, f"{name} {number}") for number, one in enumerate(value)]

    return check_all


def to_host(value: Any) -> Any:
    """A PyTorch tensor or JAX array as a numpy array; anything else unchanged."""
    if callable(getattr(value, "detach", None)) and callable(getattr(value, "cpu", None)):
        value = value.detach().cpu()
        if "bfloat16" in str(value.dtype):  # numpy does not know it
            value = value.float()
        return np.asarray(value.resolve_conj().resolve_neg())
    if isinstance(value, np.ndarray | np.generic) or not hasattr(value, "__array__"):
        array = value
    elif hasattr(value, "dtype") and hasattr(value, "shape"):
        array = np.asarray(value)
    else:
        return value
    if getattr(array, "dtype", None) is not None and array.dtype.name == "bfloat16":
        return array.astype(np.float32)
    return array


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the line outside of k3jax from which it was called."""
    level, frame = 2, sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("k3jax"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def finite_array(values: Any, name: str) -> np.ndarray:
    """A host array in float32, in which every value is finite.

    Raises:
        ValueError: NaN or infinity (with the first such place), or no array of numbers.
    """
    if isinstance(values, str | bytes):
        raise ValueError(f"{name} is {shown(values)}; it must be an array of numbers.")
    try:
        with np.errstate(over="ignore"):
            array = np.asarray(to_host(values))
            if array.dtype.kind not in "buif":
                raise TypeError
            array = array.astype(np.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        kind = type(values).__name__
        raise ValueError(f"{name} must be an array of numbers, not {kind}.") from None
    finite = np.isfinite(array)
    if not finite.all():
        place = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(
            f"{name} holds {array.size - np.count_nonzero(finite)} values that are not finite "
            f"(NaN, infinity, or too large for float32); the first is {array[place]} at {place}: "
            "give finite numbers."
        )
    return array


def _scalar(value: Any) -> Any:
    """The number in an array or tensor of no dimensions; anything else unchanged."""
    value = to_host(value)
    if isinstance(value, np.ndarray) and value.ndim == 0:
        return value[()]
    return value


def _is_no_number(value: Any) -> bool:
    if isinstance(value, np.generic | np.ndarray):
        return value.ndim > 0 or value.dtype.kind not in "iuf"
    return isinstance(value, bool | str | bytes | bytearray | complex)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)
