# SPDX-License-Identifier: Apache-2.0
"""Evaluations, seconds, dollars and speed-ups."""

import dataclasses

import numpy as np
import pytest

from k3jax.config import SamplerConfig
from k3jax.planning.throughput import Evaluations, baseline, evaluations, total


BASE = SamplerConfig()  # kandinsky, 50 steps, guided
FLASH = SamplerConfig(name="flash", num_inference_steps=4, guidance_scale=0.0)


def test_evaluations():
    assert evaluations(BASE) == Evaluations(50, 0) and evaluations(BASE).passes == 100
    assert evaluations(BASE, (10, 29)) == Evaluations(20, 30)
    assert evaluations(BASE, (40, 49)) == Evaluations(10, 40)
    assert evaluations(dataclasses.replace(BASE, guidance_scale=0.0)) == Evaluations(0, 50)
    assert evaluations(FLASH) == Evaluations(0, 4)
    # Flash's steps are the model's own, and guidance has no meaning there.
    asked = dataclasses.replace(FLASH, num_inference_steps=30, guidance_scale=3.0)
    assert evaluations(asked) == Evaluations(0, 4)
    fewer = dataclasses.replace(BASE, name="dpm++2m", num_inference_steps=20)
    assert evaluations(fewer) == Evaluations(20, 0)
    for interval in ((3, 1), (40, 50), (60, 70), (0.2, 0.8)):
        with pytest.raises(ValueError, match="guidance_interval"):
            evaluations(BASE, interval)


def totals(seconds, made, against=BASE, price=None, chips=8):
    against, name = baseline(against)
    return total(
        images=32,
        chips=chips,
        peak=1e14,
        seconds=seconds,
        flops=dict.fromkeys(seconds, 1e12),
        counts=made,
        against=evaluations(against),
        baseline=name,
        price=price,
    )


def test_a_batch_adds_up():
    seconds = {"encode": 1.0, "denoise": 0.2, "decode": 3.0}
    found = totals(seconds, evaluations(BASE), price=1.2)
    assert found.seconds == pytest.approx(1 + 50 * 0.2 + 3)
    assert (found.encode, found.denoise, found.decode) == (1, 10, 3)
    assert found.images_per_second_per_chip == pytest.approx(32 / 14 / 8)
    assert found.share_of_peak == pytest.approx(52e12 / (14 * 1e14))
    assert found.speed_up == 1 and found.baseline == "50 guided steps of kandinsky"
    # 8 chips for 14 seconds make 32 images.
    assert found.dollars_per_1000 == pytest.approx(1.2 * 8 * 14 / 3600 / 32 * 1000)
    assert totals(seconds, evaluations(BASE)).dollars_per_1000 is None


def test_speed_ups():
    seconds = {"encode": 1.0, "denoise": 0.2, "decode": 3.0}
    half = dataclasses.replace(BASE, num_inference_steps=25)
    assert totals(seconds, evaluations(half)).speed_up == pytest.approx(14 / 9)
    interval = seconds | {"denoise_plain": 0.12}
    found = totals(interval, evaluations(BASE, (0, 19)))
    assert found.denoise == pytest.approx(20 * 0.2 + 30 * 0.12)
    assert found.speed_up == pytest.approx(14 / found.seconds)


def test_flash_against_the_base_model():
    seconds = {"encode": 1.0, "denoise_plain": 0.1, "decode": 3.0}
    found = totals(seconds, evaluations(FLASH), against=FLASH)
    assert found.seconds == pytest.approx(4.4)
    # A guided step, which was not compiled, counts as two passes.
    assert found.speed_up == pytest.approx((1 + 50 * 0.2 + 3) / 4.4)
    assert found.baseline == "the base model's 50 guided steps of kandinsky"


def test_parts_alone():
    found = totals({"decode": 2.0}, evaluations(BASE))
    assert found.seconds == 2 and found.denoise == 0 and np.isclose(found.speed_up, 1)
