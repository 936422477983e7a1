# SPDX-License-Identifier: Apache-2.0
"""The compiled programs of the pipeline, except the denoising loop.

All take the modules as arguments (a module is a pytree), so each compiles once per shape, and all
keep the split of the batch.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import jax
import jax.numpy as jnp

from k3jax.config import ConditioningFamily
from k3jax.model.conditioning import ContextCache
from k3jax.model.context import Context, PromptEmbeds, TextProjection
from k3jax.model.inpainting_inputs import inpainting_inputs
from k3jax.model.movq import MoVQ, normalize
from k3jax.model.text_encoder import TextEncoder
from k3jax.model.unet import UNet
from k3jax.sampling.denoise import draw_noise
from k3jax.sharding import constrain, data_parallelism, on_mesh


@jax.jit
def encode_text(encoder: TextEncoder, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
    """Token ids and mask (b, n) -> embeddings (b, n, d_model)."""
    return encoder(input_ids, attention_mask)


@functools.partial(jax.jit, static_argnames="conditioning")
def make_contexts(
    projection: TextProjection,
    prompt: PromptEmbeds,
    negative: PromptEmbeds | None,
    has_negative: jax.Array | None,
    *,
    conditioning: ConditioningFamily,
) -> tuple[Context, Context]:
    """Contexts of prompts and of what they are guided away from.

    Args:
        negative: embeddings of negative prompts, windows already widened to the prompts'; None
            when no sample has any.
        has_negative: bool (b,), false where a sample has none.

    Returns:
        (context, unconditional), batch as `prompt`.
    """
    context = projection(prompt, conditioning)
    rows = prompt.embeds.shape[1]
    if negative is None:
        return context, projection.unconditional(prompt.lengths, rows, conditioning)
    of_text = projection(negative, conditioning)
    of_nothing = projection.unconditional(negative.lengths, rows, conditioning)

    def choose(one, other):
        return jnp.where(has_negative.reshape(-1, *(1,) * (one.ndim - 1)), one, other)

    return context, jax.tree.map(choose, of_text, of_nothing)


@jax.jit
def context_caches(unet: UNet, *contexts: Context | None) -> tuple[ContextCache | None, ...]:
    """What the U-Net computes from contexts alone, once for all steps."""
    return tuple(None if context is None else unet.context_cache(context) for context in contexts)


@functools.partial(jax.jit, static_argnames="shape")
def initial_latents(key_data: jax.Array, *, shape: tuple[int, int, int]) -> jax.Array:
    """The noise that sampling starts from, float32 (b, *shape)."""
    return draw_noise(key_data, 0, shape)


@functools.partial(jax.jit, static_argnames=("splits", "as_uint8"))
def decode_latents(movq: MoVQ, latents: jax.Array, *, splits: int, as_uint8: bool) -> jax.Array:
    """Latents (b, h/8, w/8, 4) -> images (b, h, w, 3), float32 in [0, 1] or uint8 (rounded).

    Each of the `splits` devices that the batch is split over decodes its images one at a time: the
    decoder's activations are the largest of the model, and stay those of one image.
    """
    images = _one_by_one(movq.decode, latents, splits)
    images = jnp.clip(images * 0.5 + 0.5, 0.0, 1.0)
    return jnp.round(images * 255).astype(jnp.uint8) if as_uint8 else images


@functools.partial(jax.jit, static_argnames="splits")
def encode_images(movq: MoVQ, images: jax.Array, *, splits: int) -> jax.Array:
    """Images uint8 (b, h, w, 3) -> latents, float32 (b, h/8, w/8, 4), one at a time."""

    return _one_by_one(lambda image: movq.encode(normalize(image)), images, splits)


@functools.partial(jax.jit, static_argnames="splits")
def encode_masked(movq: MoVQ, images: jax.Array, masks: jax.Array, *, splits: int) -> jax.Array:
    """The extra channels of an inpainting U-Net, float32 (b, h/8, w/8, 5).

    Args:
        images: uint8 (b, h, w, 3).
        masks: float32 (b, h, w), 1 known, 0 to be painted.
    """

    def encode(images):
        return _one_by_one(movq.encode, images, splits)

    return jnp.concatenate(inpainting_inputs(images, masks, encode), axis=-1)


@jax.jit
def add_noise(latents: jax.Array, noise: jax.Array, alpha, sigma) -> jax.Array:
    """Latents at the noise level of a step."""
    return alpha * latents + sigma * noise


@jax.jit
def put_back(latents: jax.Array, known: jax.Array, mask: jax.Array) -> jax.Array:
    """`known` where the mask (b, h, w, 1) is 1."""
    return mask * known + (1 - mask) * latents


@contextlib.contextmanager
def computing(mesh: jax.sharding.Mesh, dtype) -> Iterator[None]:
    """The context in which programs are traced: they know their mesh, and float32 is float32.

    TPUs and GPUs multiply float32 in bfloat16 or TF32 unless told otherwise.
    """
    full = jnp.dtype(dtype) == jnp.float32
    with on_mesh(mesh), jax.default_matmul_precision("highest") if full else nullcontext():
        yield


def image_splits(mesh: jax.sharding.Mesh, batch_size: int) -> int:
    """The number of devices a batch is split over, checked to divide it."""
    splits = data_parallelism(mesh)
    if batch_size % splits or batch_size < 1:
        raise ValueError(
            f"batch_size is {batch_size}, but the mesh splits a batch over {splits} devices "
            f"(data x fsdp): choose a multiple of {splits}."
        )
    return splits


def _one_by_one(function: Callable, x: jax.Array, splits: int) -> jax.Array:
    """`function` of a batch, each of `splits` devices taking its part one by one."""
    b, *rest = x.shape
    turns = constrain(x.reshape(splits, b // splits, *rest).swapaxes(0, 1), None, "batch", ...)
    out = constrain(jax.lax.map(function, turns), None, "batch", ...).swapaxes(0, 1)
    return constrain(out.reshape(b, *out.shape[2:]), "batch", ...)
