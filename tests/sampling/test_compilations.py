# SPDX-License-Identifier: Apache-2.0
"""The U-Net is compiled once, whatever the steps, the strength, the interval and the callback."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from k3jax import Kandinsky3Img2ImgPipeline, Kandinsky3Pipeline
from k3jax.sampling.denoise import denoise_program
from k3jax.sharding import make_mesh

from random_checkpoint import MODEL, write_random_checkpoint


STEPS, STRENGTHS = (1, 3, 5, 6, 12), (0.3, 0.5, 0.8, 1.0)
CALL = dict(output_type="latent", progress_bar=False, seed=1, num_inference_steps=12)
UNET = dataclasses.replace(
    MODEL.unet,
    init_channels=32,
    block_out_channels=(32,),
    add_cross_attention=(True,),
    add_self_attention=(False,),
)


@pytest.fixture(scope="module")
def edit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random") / "checkpoint"
    write_random_checkpoint(folder, dataclasses.replace(MODEL, unet=UNET))
    mesh = make_mesh("data=1", jax.devices()[:1])
    return Kandinsky3Img2ImgPipeline.from_pretrained(folder, mesh=mesh, dtype="float32")


def latents(edit, **kwargs):
    """Of text to image with all numbers of steps, then of image to image with all strengths."""
    create = Kandinsky3Pipeline.from_pipe(edit)
    image = Image.fromarray(np.full((64, 64, 3), 99, np.uint8))
    kwargs = CALL | kwargs
    size = dict(height=64, width=64)
    return [
        *(create("a cat", **size, **kwargs | dict(num_inference_steps=n)).images for n in STEPS),
        *(edit("a cat", image, strength=share, **kwargs).images for share in STRENGTHS),
    ]


@pytest.mark.filterwarnings("ignore:guidance_interval")  # guides none of the last steps
def test_one_compilation(edit):
    """Also of a multistep sampler with a callback; with an interval it is another program."""
    denoise_program.clear_cache()
    previews = []
    always = latents(edit, sampler="dpm++2m")
    again = latents(edit, sampler="dpm++2m", callback=previews.append, callback_steps=4)
    assert denoise_program._cache_size() == 1
    assert {(p.step, p.num_steps) for p in previews} >= {(4, 6), (4, 12), (8, 12), (12, 12)}
    for one, other in zip(always, again, strict=True):
        assert np.array_equal(one, other)
    first = latents(edit, sampler="dpm++2m", guidance_interval=(0, 0))
    create = Kandinsky3Pipeline.from_pipe(edit)
    create("a cat", height=64, width=64, sampler="dpm++2m", guidance_interval=(2, 9), **CALL)
    assert denoise_program._cache_size() == 2
    # One step is guided by both programs; with more, others are not.
    np.testing.assert_allclose(first[0], always[0], atol=1e-4)
    assert np.abs(first[1] - always[1]).max() > 1e-3
