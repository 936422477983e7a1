# SPDX-License-Identifier: Apache-2.0
"""Stored programs, and plans whose compiler is a table."""

from pathlib import Path

import pytest

from k3jax.pipelines.load_options import LoadOptions
from k3jax.pipelines.options import TextToImageOptions
from k3jax.planning.chips import parse_slice
from k3jax.planning.hlo import parse_hlo
from k3jax.planning.workload import PARTS, PlanOptions

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
    """The options of a plan of the full-size model, or of another config, with changes."""

    def make(topology="v5e:2x4", config="kandinsky3", batch=4, parts=PARTS, price=None, **changes):
        load = {name: changes.pop(name) for name in ("mesh", "encoder_mesh") if name in changes}
        return PlanOptions(
            where=parse_slice(topology),
            model=model_of(config),
            call=TextToImageOptions(**{"height": 1024, "width": 1024, **changes}),
            load=LoadOptions(**load),
            batch=batch,
            parts=parts,
            price=price,
        )

    return make
