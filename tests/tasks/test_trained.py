# SPDX-License-Identifier: Apache-2.0
"""The tasks with the small trained models: what is asked for is there, the rest is left alone."""

import pytest

from k3jax import Kandinsky3Img2ImgPipeline, Kandinsky3InpaintPipeline
from k3jax.packaged import packaged_path

from trained import img2img, inpaint


pytestmark = pytest.mark.slow


def packaged(name: str) -> str:
    path = packaged_path(name)
    if path is None or not path.exists():
        pytest.skip(f"the weights of {name} are not here")
    return name


def test_a_removed_object_is_put_back():
    pipe = Kandinsky3InpaintPipeline.from_pretrained(
        packaged("tiny-inpainting"), dtype="float32", batch_size=40
    )
    assert pipe.method == "model"
    shares = inpaint(pipe, 200)
    assert shares["there"] >= 0.85, shares
    assert shares["rest"] >= 0.95 and shares["untouched"] == 1, shares


def test_a_base_model_puts_it_back_by_blending():
    """Less often, because it does not know that there is a hole."""
    pipe = Kandinsky3InpaintPipeline.from_pretrained(
        packaged("tiny"), dtype="float32", batch_size=40
    )
    shares = inpaint(pipe, 80)
    assert shares["there"] >= 0.5, shares
    assert shares["untouched"] == 1, shares


def test_image_to_image_keeps_the_layout_and_then_follows_the_prompt():
    pipe = Kandinsky3Img2ImgPipeline.from_pretrained(
        packaged("tiny"), dtype="float32", batch_size=40
    )
    strengths = img2img(pipe, 40, (0.2, 0.9))["strengths"]
    assert strengths[0.2]["place"] >= 0.9, strengths
    assert strengths[0.9]["prompt"] >= 0.7 > strengths[0.2]["prompt"], strengths
