# SPDX-License-Identifier: Apache-2.0
"""A 9-channel U-Net that begins as the 4-channel one, and what its other channels hold."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from k3jax.model.inpainting_inputs import inpainting_inputs
from k3jax.training.data.inpainting_masks import draw_masks
from k3jax.training.tasks.inpainting import extra_channels_of, inpainting_config, inpainting_unet
from k3jax.training.train_config import MaskConfig

import training_models
from random_checkpoint import random_module


# What is tested is the first convolution: no attention, and so no context.
UNET = dataclasses.replace(
    training_models.UNET, add_cross_attention=(False,), add_self_attention=(False,)
)
MODEL = dataclasses.replace(training_models.MODEL, unet=UNET)


@pytest.fixture(scope="module")
def unet():
    return random_module("unet", MODEL, np.random.default_rng(0))


def test_it_begins_as_the_base(unet):
    """To the last bits: the sum over 9 channels, 5 of them times zero, may be ordered otherwise."""
    config = inpainting_config(MODEL)
    assert config.unet == dataclasses.replace(MODEL.unet, in_channels=9)
    assert (config.sampler.guidance_scale, config.sampler.threshold_percentile) == (4.0, 0.95)
    made = inpainting_unet(unet, config)
    kernel = made.conv_in.kernel[...]
    assert kernel.shape == (3, 3, 9, MODEL.unet.init_channels)
    np.testing.assert_array_equal(kernel[:, :, :4], unet.conv_in.kernel[...])
    assert not kernel[:, :, 4:].any()
    old = dict(nnx.to_flat_state(nnx.state(unet)))
    for path, variable in nnx.to_flat_state(nnx.state(made)):
        if path != ("conv_in", "kernel"):
            assert variable.get_value() is old[path].get_value(), path

    rng = np.random.default_rng(1)
    sample, timesteps = rng.standard_normal((2, 8, 8, 4), np.float32), np.array([1.0, 999.0])
    mask = rng.integers(0, 2, (*sample.shape[:3], 1)).astype(np.float32)
    masked = rng.standard_normal(sample.shape, np.float32)
    nine = np.concatenate([sample, extra_channels(mask, masked)], axis=-1)
    call = jax.jit(lambda unet, sample: unet(sample, timesteps, None))
    expected = call(unet, sample)
    assert training_models.relative_error(call(made, nine), expected) < 1e-6


def test_both_samplers_of_the_original_inpaint_with_its_defaults():
    sampler = dataclasses.replace(MODEL.sampler, name="kandinsky30")
    config = inpainting_config(dataclasses.replace(MODEL, sampler=sampler))
    assert (config.sampler.guidance_scale, config.sampler.threshold_percentile) == (4.0, 0.95)


def test_another_sampler_keeps_its_defaults():
    sampler = dataclasses.replace(MODEL.sampler, name="ddpm", guidance_scale=2.5)
    config = inpainting_config(dataclasses.replace(MODEL, sampler=sampler))
    assert config.sampler == sampler


def test_what_cannot_be_a_start_is_refused(unet):
    config = inpainting_config(MODEL)
    with pytest.raises(ValueError, match="takes 9 channels, not 4: inpainting starts from a text"):
        inpainting_config(config)
    with pytest.raises(ValueError, match="of another architecture than the inpainting config"):
        inpainting_unet(unet, inpainting_config(training_models.MODEL))


def extra_channels(mask, masked_latents):
    """As training puts them together."""
    return extra_channels_of({"mask": mask, "masked_latents": masked_latents}, {})


def brightness(images):
    """Stands in for MoVQ: means of 8x8 pixels, as 4 channels."""
    b, h, w, _ = images.shape
    means = images.reshape(b, h // 8, 8, w // 8, 8, 3).mean((2, 4, 5))
    return jnp.repeat(means[..., None], 4, axis=-1)


def test_what_is_painted_is_grey_before_it_is_encoded():
    images = np.full((1, 16, 24, 3), 255, np.uint8)
    masks = np.ones((1, 16, 24), np.float32)
    masks[0, :8, 8:16] = 0
    mask, latents = jax.jit(lambda i, m: inpainting_inputs(i, m, brightness))(images, masks)
    assert mask.shape == (1, 2, 3, 1) and latents.shape == (1, 2, 3, 4)
    np.testing.assert_array_equal(mask[0, :, :, 0], [[1, 0, 1], [1, 1, 1]])
    np.testing.assert_allclose(latents[0, :, :, 0], [[1, 0, 1], [1, 1, 1]], rtol=1e-6)
    nine = np.concatenate([7 * np.ones((1, 2, 3, 4)), extra_channels(mask, latents)], axis=-1)
    np.testing.assert_array_equal(nine[0, 0, 1], [7, 7, 7, 7, 0, 0, 0, 0, 0])
    # Floats in [-1, 1] are taken as they are; the mask is sampled at the corner of each 8x8.
    masks[0, 0, 0] = 0.25
    mask, latents = inpainting_inputs(images / 127.5 - 1, masks, brightness)
    assert mask[0, 0, 0, 0] == 0.25 and latents[0, 0, 0, 0] == 63 / 64


def test_the_latents_are_those_of_movq():
    """Through MoVQ itself: with nothing masked they are the image's."""
    movq = random_module("movq", MODEL, np.random.default_rng(0))
    encode = jax.jit(lambda images: movq.encode(images))
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    mask, latents = inpainting_inputs(images, np.ones((2, 16, 16)), encode)
    np.testing.assert_array_equal(latents, encode(images))
    assert mask.shape == (2, 2, 2, 1) and mask.all()


def test_batches_and_variants():
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), np.uint8)
    masks = draw_masks(images, np.random.default_rng(1), MaskConfig(1, 0, 0))
    assert masks.shape == (3, 16, 24)
