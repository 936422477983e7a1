# SPDX-License-Identifier: Apache-2.0
"""The image tasks with the small trained models: the named thing comes, the rest stays."""

import pytest

from k3jax import Kandinsky3Img2ImgPipeline, Kandinsky3InpaintPipeline

import trained


LOAD = dict(dtype="float32", mesh="data=8", batch_size=24)


@pytest.mark.slow
def test_removed_objects_are_put_back_by_their_captions():
    """The claim of the README, in scenes with looks or pairs that training never saw."""
    pipe = Kandinsky3InpaintPipeline.from_pretrained("tiny-inpainting", **LOAD)
    assert pipe.method == "model"
    result = trained.inpaint(pipe, 200)
    result.pop("shown")
    print(f"\n{result}")
    assert result["there"] >= 0.85
    assert result["rest"] >= 0.95
    assert result["untouched"] == 1


@pytest.mark.slow
def test_strength_goes_from_the_image_to_the_prompt():
    pipe = Kandinsky3Img2ImgPipeline.from_pretrained("tiny", **LOAD)
    result = trained.img2img(pipe, 48)["strengths"]
    print(f"\n{result}")
    low, high = result[min(result)], result[max(result)]
    assert low["place"] >= 0.9 and low["prompt"] <= 0.3
    assert high["prompt"] >= 0.85 and high["place"] <= 0.5
