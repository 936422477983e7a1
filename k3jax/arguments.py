# SPDX-License-Identifier: Apache-2.0
"""Checks of single arguments that a person gives: whole numbers, and arrays of finite numbers."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np


def whole_number(value: Any, name: str, least: int | None = None) -> int:
    """A Python int from any kind of whole number: int, a numpy integer, 25.0.

    Args:
        name: of the argument, for the sentence.
        least: the smallest value allowed; None: any.

    Raises:
        ValueError: a fraction, a bool, a text, or less than `least`.
    """
    number = None
    if isinstance(value, float | np.floating):
        number = int(value) if float(value).is_integer() else None
    elif not isinstance(value, bool | np.bool_):
        try:
            number = operator.index(value)
        except TypeError:
            pass
    if number is None:
        raise ValueError(f"{name} is {value!r}; it must be a whole number.")
    if least is not None and number < least:
        raise ValueError(f"{name} is {number}; it must be {least} or more.")
    return number


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
            f"{name} is {value!r}; it must be two whole numbers, the first and the last step, "
            f"counted from 0: of {count} steps, within (0, {count - 1})."
        )
    return first, last


def check_number(value: Any, name: str, least: float = -math.inf) -> float:
    """A finite float of `least` or more.

    Raises:
        ValueError: anything else, NaN and infinity too.
    """
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} is {value!r}; it must be a finite number.")
    if number < least:
        raise ValueError(f"{name} is {value!r}; it must be {least:g} or more.")
    return number


def finite_array(values: Any, name: str) -> np.ndarray:
    """A host array in float32, in which every value is finite.

    Raises:
        ValueError: NaN or infinity (with the first such place), or no array of numbers.
    """
    try:
        with np.errstate(over="ignore"):
            array = np.asarray(values, np.float32)
    except (TypeError, ValueError):
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
