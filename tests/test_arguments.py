# SPDX-License-Identifier: Apache-2.0
"""What counts as a whole number, an interval, an array of finite numbers."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from k3jax.arguments import check_interval, check_number, finite_array, whole_number
from k3jax.pipelines.call_inputs import image_seeds
from k3jax.pipelines.options import check_seeds


@pytest.mark.parametrize(
    "value",
    [25, 25.0, np.int8(25), np.uint64(25), np.float32(25), np.array(25), jnp.array(25)],
    ids=repr,
)
def test_whole_numbers(value):
    number = whole_number(value, "steps")
    assert number == 25 and type(number) is int


@pytest.mark.parametrize(
    "value",
    [True, np.True_, 25.5, np.nan, np.inf, "25", None, [25], np.array([25, 26]), 1 + 0j],
    ids=repr,
)
def test_what_is_no_whole_number(value):
    with pytest.raises(ValueError, match=r"^steps is .*; it must be a whole number.$"):
        whole_number(value, "steps")


@pytest.mark.parametrize(
    "kind", [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64]
)
def test_seeds_do_not_wrap(kind):
    largest = int(np.iinfo(kind).max)
    for seed in (kind(largest), np.array(largest, kind)):
        assert image_seeds(check_seeds(seed, "seed"), 3) == [largest, largest + 1, largest + 2]
    seeds = image_seeds(check_seeds(np.array([1, largest], kind), "seed"), 2)
    assert seeds == [1, largest] and all(type(seed) is int for seed in seeds)


def test_bounds():
    assert whole_number(1, "n", least=1) == 1 and check_number(0, "x", least=0) == 0
    with pytest.raises(ValueError, match="n is 0; it must be 1 or more"):
        whole_number(0, "n", least=1)
    with pytest.raises(ValueError, match=r"x is -0.5; it must be 0 or more"):
        check_number(-0.5, "x", least=0)
    for value in (np.nan, np.inf, "1", None, 10**400):
        with pytest.raises(ValueError, match=r"x is .*; it must be a finite number"):
            check_number(value, "x")


def test_intervals():
    for interval in ((0, 9), [0.0, 9.0], np.array([0, 9])):
        assert check_interval(interval, "steps", 10) == (0, 9)
    for interval in ((0.2, 0.8), (20, 30), (0, 10), (-1, 3), (5, 4), (1,), (1, 2, 3), 5, "ab"):
        with pytest.raises(ValueError, match=re.escape(f"steps is {interval!r}; it must be two")):
            check_interval(interval, "steps", 10)


def test_arrays():
    assert finite_array([[1, 2]], "latents").dtype == np.float32
    with pytest.raises(ValueError, match=r"latents holds 2 .* first is nan at \(1, 0\)"):
        finite_array([[0, 1], [np.nan, np.inf]], "latents")
    with pytest.raises(ValueError, match=r"latents holds 1 .* too large for float32"):
        finite_array(np.array([1e39]), "latents")
    with pytest.raises(ValueError, match="latents must be an array of numbers, not list"):
        finite_array([[1], [1, 2]], "latents")
