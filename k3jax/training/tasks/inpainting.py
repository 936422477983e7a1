# SPDX-License-Identifier: Apache-2.0
"""The task inpainting: a U-Net of 9 input channels, from one of 4 or one of 9.

The 5 channels after the latents are described in k3jax/model/inpainting_inputs.py.
"""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from k3jax.config import ModelConfig
from k3jax.model.abstract import abstract_module
from k3jax.model.inpainting_inputs import inpainting_inputs
from k3jax.model.movq import MoVQ
from k3jax.model.unet import UNet
from k3jax.pipelines.inpaint import Kandinsky3InpaintPipeline
from k3jax.training.data.inpainting_masks import check_masks, draw_masks
from k3jax.training.sample_grids import MAX_SHOWN, grid, pipeline_of
from k3jax.training.tasks.denoising import Denoising, encode_images


class Inpainting(Denoising):
    """Trains a U-Net that also sees a mask and the latents of the masked image."""

    name = "inpainting"

    def __init__(self, config, model, base, mesh):
        if model.unet.in_channels == model.movq.latent_channels:
            model = inpainting_config(model)
        super().__init__(config, model, base, mesh)

    def check(self) -> None:
        check_masks(self.config.masks, self.config.data)
        super().check()

    def first_module(self, name: str) -> nnx.Module:
        """A trained component at step 0; a U-Net of 4 channels is widened to 9."""
        module = super().first_module(name)
        if name == "unet" and module.config.in_channels != self.model.unet.in_channels:
            return inpainting_unet(module, self.model)
        return module

    def arrays(self, batch, number, tokenize):
        # The masks depend on the number of the batch only.
        rng = np.random.default_rng([self.config.seed, number, jax.process_index()])
        masks = draw_masks(batch["images"], rng, self.config.masks)
        return {**super().arrays(batch, number, tokenize), "masks": masks}

    def cached_arrays(self, batch, number):
        arrays, c = super().cached_arrays(batch, number), self.model.movq.latent_channels
        latents = arrays["latents"]
        channels = {"mask": latents[..., c : c + 1], "masked_latents": latents[..., c + 1 :]}
        return {**arrays, "latents": latents[..., :c], **channels}

    def cached_latents(self, movq, images, sharding):
        """Latents, mask and latents of the masked image: 9 channels.

        Each image has one mask in the cache, drawn from a hash of its pixels.
        """
        rngs = [np.random.default_rng(zlib.crc32(image.tobytes())) for image in images]
        masks = [
            draw_masks(image[None], rng, self.config.masks)
            for image, rng in zip(images, rngs, strict=True)
        ]
        return _inpainting_latents(movq, *jax.device_put((images, np.concatenate(masks)), sharding))

    def extra_channels(self, batch, modules):
        return extra_channels_of(batch, modules)

    def shown_prompts(self, batch):
        images = batch.get("images", ())  # with a cache there are none to show
        return self.config.sample_prompts[: min(len(images), MAX_SHOWN)]

    def grid(self, modules, prompts, batch):
        """Rows of: the input, the output, the original."""
        images, masks = (batch[name][: len(prompts)] for name in ("images", "masks"))
        count, height, width, _ = images.shape
        pipe = pipeline_of(Kandinsky3InpaintPipeline, self.model, modules, self.mesh, count)
        output = pipe(
            prompt_embeds=prompts,
            image=list(images),
            mask_image=list(1 - masks),
            max_area=height * width,
            paste_back=False,
            progress_bar=False,
        )
        masked = np.where(masks[..., None] < 1, np.uint8(128), images)
        columns = np.stack([masked, np.stack(output.images), images], axis=1)
        return grid(columns.reshape(-1, *images.shape[1:]), columns=3 * max(1, count // 8))


def extra_channels_of(batch, modules) -> jax.Array:
    """Mask and masked latents, (b, h/8, w/8, 5): cached, or computed now."""
    if "masked_latents" in batch:
        mask, masked = batch["mask"], batch["masked_latents"]
    else:
        mask, masked = inpainting_inputs(batch["images"], batch["masks"], modules["movq"].encode)
    return jnp.concatenate([mask, jax.lax.stop_gradient(masked)], axis=-1).astype(jnp.float32)


@jax.jit
def _inpainting_latents(movq: MoVQ, images: jax.Array, masks: jax.Array) -> jax.Array:
    mask, masked = inpainting_inputs(images, masks, movq.encode)
    return jnp.concatenate([encode_images(movq, images), mask, masked], axis=-1)


def inpainting_config(config: ModelConfig) -> ModelConfig:
    """The model with 9 input channels.

    The original's own samplers get the defaults of its inpainting; others keep theirs.

    Raises:
        ValueError: the U-Net has other input channels than the latents.
    """
    latents = config.movq.latent_channels
    if config.unet.in_channels != latents:
        raise ValueError(
            f"the U-Net takes {config.unet.in_channels} channels, not {latents}: inpainting starts "
            "from a text-to-image checkpoint, or resumes from an inpainting one."
        )
    sampler = config.sampler
    if sampler.name in ("kandinsky", "kandinsky30"):
        sampler = dataclasses.replace(sampler, guidance_scale=4.0, threshold_percentile=0.95)
    unet = dataclasses.replace(config.unet, in_channels=2 * latents + 1)
    return dataclasses.replace(config, unet=unet, sampler=sampler)


def inpainting_unet(unet: UNet, config: ModelConfig) -> UNet:
    """A U-Net that ignores mask and masked image at first: their weights are zero.

    Its output is that of `unet` (up to the order of summation in one convolution), and all weights
    except `conv_in.kernel` are the same arrays.

    Args:
        unet: 4 input channels, with weights.
        config: from `inpainting_config`.

    Returns:
        The module; `conv_in.kernel` needs another sharding on a mesh, which 9 channels may not
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
    module = nnx.merge(graph, nnx.from_flat_state(flat))
    module.remat = unet.remat
    return module
