# SPDX-License-Identifier: Apache-2.0
"""A plan as text and as JSON."""

import json

import pytest

from k3jax.planning.compiler import Compiled, size_text
from k3jax.planning.plan import make_plan
from k3jax.planning.report import to_json, to_lines

from made_programs import compiled


def plan_of(plan_options, **programs):
    made = {"arguments": 1e9, **programs}
    return make_plan(plan_options, lambda name, work: compiled(**made), lambda text: None)


def test_json(plan_options):
    plan = plan_of(plan_options(guidance_interval=(0, 19), price=1.2))
    values = json.loads(json.dumps(to_json(plan)))
    assert values["topology"] == "v5e:2x4" and values["chips"] == 8
    assert values["batch_per_chip"] == 4 and values["totals"]["images"] == 32
    names = [program["name"] for program in values["programs"]]
    assert names == ["encode", "denoise", "denoise_plain", "decode"]
    assert [program["runs"] for program in values["programs"]] == [1, 20, 30, 1]
    assert values["evaluations"] == {"steps": 50, "guided": 20, "plain": 30, "unet_passes": 70}
    for program in values["programs"]:
        assert 0 < program["memory"]["share_of_hbm"] < 1
        assert program["figure"] == "schedule" and program["share_of_peak"] > 0
        kinds = program["seconds_by_kind"]
        assert set(kinds) == {"products", "copies", "waiting"}
        assert sum(kinds.values()) == pytest.approx(program["seconds"])
        assert program["compile_seconds"] == 300 and program["collectives"] == []
    assert values["totals"]["dollars_per_1000"] > 0 and values["price_per_chip_hour"] == 1.2
    assert any("+-15 %" in note for note in values["notes"])


def test_text(plan_options):
    collectives = (("all-gather", 3, 2e6), ("all-reduce", 21, 7e8))
    plan = plan_of(plan_options(mesh="data=2,tensor=4"), collectives=collectives)
    text = "\n".join(to_lines(plan))
    for words in (
        "v5e:2x4: 8 chips of 16.9 GB, 4 images per chip, 8 at a time",
        "data=2,tensor=4",
        "21, 700 MB",
        "ms by the schedule",
        "  products",
        "  waiting",
        "50 steps of kandinsky, 50 with guidance and 0 without: 100 U-Net passes an image",
        "images/s/chip",
        "1 times as fast as 50 guided steps of kandinsky",
        "All weights fit the chips together.",
        "Collectives are timed at the links' full bandwidth",
        "+-15 %",
    ):
        assert words in text, text
    assert "per 1,000 images" not in text  # no price was given


def test_which_figure_is_said(plan_options):
    text = "\n".join(to_lines(plan_of(plan_options("v6e:2x4"), figure="floor")))
    assert "ms by the floor" in text and "dumped no schedule" in text and "+-15 %" not in text
    assert "v6e has no valid calibration" in text


def test_parts_left_out_are_named(plan_options):
    text = "\n".join(to_lines(plan_of(plan_options(parts=("denoise",)))))
    assert "Left out of all totals: text encoder, decoder." in text
    split = "\n".join(to_lines(plan_of(plan_options())))
    assert "on a mesh of its own" in split and "data=4,fsdp=2" in split


def test_round_trip_and_units():
    one = compiled(collectives=(("all-reduce", 1, 8.0),))
    assert Compiled.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert [size_text(n) for n in (0, 999, 1e6, 17.4e9)] == ["0 B", "999 B", "1 MB", "17.4 GB"]
