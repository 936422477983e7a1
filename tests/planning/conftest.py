# SPDX-License-Identifier: Apache-2.0
"""Stored programs, and plans whose compiler is a table."""

from pathlib import Path

import pytest

from k3jax.planning.chips import parse_slice
from k3jax.planning.hlo import parse_hlo
from k3jax.planning.workload import PlanOptions

from made_programs import model_of


STORED = Path(__file__).parent / "stored"


@pytest.fixture
def stored():
    """The optimised HLO of a small program; see make_stored.py."""
    return lambda name: parse_hlo((STORED / f"{name}.hlo.txt").read_text())


@pytest.fixture
def schedules():
    """The folder with a program's stored schedules."""
    return lambda name: STORED / name


@pytest.fixture
def plan_options():
    """A plan_options about the full-size model, or another config, with changes."""

    def make(topology="v5e:2x4", config="kandinsky3", sampler=None, **changes):
        model = model_of(config)
        values = {"batch": 4, "height": 1024, "width": 1024, **changes}
        return PlanOptions(
            where=parse_slice(topology), model=model, sampler=sampler or model.sampler, **values
        )

    return make
