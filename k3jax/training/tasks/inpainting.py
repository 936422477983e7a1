# SPDX-License-Identifier: Apache-2.0
"""Inpainting: a U-Net of 9 input channels from one of 4, and what the other 5 hold.

See k3jax/model/inpainting_inputs.py for what the channels are.
"""

import dataclasses
from functools import partial

import jax.numpy as jnp
import numpy as np
from flax import nnx

from k3jax.config import ModelConfig
from k3jax.model.abstract import abstract_module
from k3jax.model.unet import UNet
from k3jax.scenes.checker import find_objects
from k3jax.training.data.inpainting_masks import Box, draw_mask
from k3jax.training.train_config import MaskConfig


def inpainting_config(config: ModelConfig) -> ModelConfig:
    """The model with 9 input channels.

    With the original's own samplers come the defaults of its inpainting; others keep theirs.

    Raises:
        ValueError: the model does inpainting already.
    """
    latents = config.movq.latent_channels
    if config.unet.in_channels != latents:
        raise ValueError(
            f"the U-Net takes {config.unet.in_channels} channels, not {latents}: inpainting starts "
            "from a text-to-image checkpoint, or goes on with an inpainting one as it is."
        )
    sampler = config.sampler
    if sampler.name in ("kandinsky", "kandinsky30"):
        sampler = dataclasses.replace(sampler, guidance_scale=4.0, threshold_percentile=0.95)
    unet = dataclasses.replace(config.unet, in_channels=2 * latents + 1)
    return dataclasses.replace(config, unet=unet, sampler=sampler)


def inpainting_unet(unet: UNet, config: ModelConfig) -> UNet:
    """A U-Net that at first ignores mask and masked image: their weights are zero.

    Its output is that of `unet` (but for the order of summation in one convolution), and all
    weights besides `conv_in.kernel` are the same arrays.

    Args:
        unet: 4 input channels, with weights.
        config: from `inpainting_config`.

    Returns:
        The module; put `conv_in.kernel` where its sharding on a mesh is, which 9 channels may not
        divide as 4 do.
    """
    kernel = unet.conv_in.kernel.get_value()
    channels = config.unet.in_channels
    if dataclasses.replace(unet.config, in_channels=channels) != config.unet:
        raise ValueError("the U-Net is of another architecture than the inpainting config.")
    graph, state = nnx.split(abstract_module("unet", config, kernel.dtype, unet.dtype))
    arrays = dict(nnx.to_flat_state(nnx.state(unet)))
    new = ((0, 0), (0, 0), (0, channels - kernel.shape[2]), (0, 0))
    flat = [
        (path, variable.replace(arrays[path].get_value()))
        if path != ("conv_in", "kernel")
        else (path, variable.replace(jnp.pad(kernel, new)))
        for path, variable in nnx.to_flat_state(state)
    ]
    made = nnx.merge(graph, nnx.from_flat_state(flat))
    made.remat = unet.remat
    return made


def draw_masks(
    images: np.ndarray, rng: np.random.Generator, config: MaskConfig | None = None
) -> np.ndarray:
    """Masks for images uint8 (b, h, w, 3): float32 (b, h, w), 1 known, 0 to be painted."""
    size = images.shape[1:3]
    return np.stack([draw_mask(rng, *size, config, partial(_boxes, image)) for image in images])


def _boxes(image: np.ndarray) -> list[Box]:
    """Around the objects of a scene, as far as its checker sees them."""
    return [
        (*np.subtract(found.center, found.extents), *np.add(found.center, found.extents))
        for found in find_objects(image)
    ]
