# SPDX-License-Identifier: Apache-2.0
"""The denoising loop: noise and context -> latents, as one `lax.scan` over the sampler's rows.

Every sample has a random key of its own and nothing crosses the batch, so a sample's latents do not
depend on what else is in the batch. State is float32 throughout.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from k3jax.arguments import check_interval, whole_number
from k3jax.config import PredictionType
from k3jax.model.context import Context
from k3jax.model.unet import UNet
from k3jax.model.unet_blocks import ReadContext
from k3jax.sampling.samplers import Sampler, Step, predicted_image
from k3jax.sharding import constrain


Predict = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]

MAX_SEED = 2**64 - 1


class Known(NamedTuple):
    """Latents that are put back at every step, noised to its level, and the result there.

    Attributes:
        latents: (b, h, w, c).
        mask: (b, h, w, 1), 1 where they are put back.
        noise: (b, h, w, c), the same at every step.
    """

    latents: jax.Array
    mask: jax.Array
    noise: jax.Array


def sample_keys(seeds: Sequence[int]) -> np.ndarray:
    """Random keys (threefry) made of the seeds alone, as key data: uint32 (b, 2)."""
    seeds = [whole_number(seed, "seed") for seed in seeds]
    for seed in seeds:
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seed {seed} is not between 0 and 2^64 - 1.")
    # Not through jax.random.key, which keeps only 32 bits of a seed unless x64 is on.
    return np.array([[seed >> 32, seed & 0xFFFFFFFF] for seed in seeds], np.uint32)


def draw_noise(key_data: jax.Array, index, shape: tuple[int, ...]) -> jax.Array:
    """Standard noise of each sample, float32 (b, *shape).

    Args:
        key_data: from `sample_keys`.
        index: 0 for the initial latents, i + 1 for step i.
        shape: (h, w, c) of one sample.
    """

    def one(data):
        key = jax.random.wrap_key_data(data, impl="threefry2x32")
        return jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32)

    return jax.vmap(one)(key_data)


def predictor(
    unet: UNet,
    context: Context | ReadContext,
    unconditional: Context | ReadContext | None,
    guidance_scale: jax.Array | None,
    extra_channels: jax.Array | None = None,
) -> Predict:
    """The U-Net with classifier-free guidance: (w + 1) conditional - w unconditional.

    Args:
        context: what `unet` is conditioned on; `UNet.read` it before, and the loop need not.
        unconditional: of the negative prompts or of none; None to do without guidance.
        guidance_scale: w of each sample, float32 (b,).
        extra_channels: (b, h, w, c) put behind the latents' channels (inpainting: mask and masked
            latents).

    Returns:
        predict(x, timestep, guide), x (b, h, w, 4), timestep a scalar, guide a scalar bool (None:
        always guide) that says whether this step pays for the unconditional half.
    """

    def run(x, timestep, context, repeats):
        if extra_channels is not None:
            x = jnp.concatenate([x, extra_channels], axis=-1)
        x = _interleave(*[x] * repeats)
        return unet(x, jnp.full(x.shape[:1], timestep), context)

    def conditional(x, timestep):
        return run(x, timestep, context, 1)

    if unconditional is None:
        return lambda x, timestep, guide: conditional(x, timestep)

    both = jax.tree.map(_interleave, context, unconditional)

    def guided(x, timestep):
        pairs = run(x, timestep, both, 2)
        pairs = constrain(pairs.reshape(-1, 2, *pairs.shape[1:]), "batch", ...)
        w = guidance_scale[:, None, None, None]
        return (w + 1) * pairs[:, 0] - w * pairs[:, 1]

    def predict(x, timestep, guide):
        if guide is None:
            return guided(x, timestep)
        return jax.lax.cond(guide, guided, conditional, x, timestep)

    return predict


def denoise(
    predict: Predict,
    step: Step,
    rows: dict[str, jax.Array],
    carry: tuple[jax.Array, ...],
    *,
    key_data: jax.Array | None,
    step_noise: jax.Array | None = None,
    renoise: bool = False,
    known: Known | None = None,
    preview: PredictionType | None = None,
) -> tuple[jax.Array, ...]:
    """Scans a sampler's step over `rows` (all of its rows, or a run of them).

    Args:
        rows: columns of the sampler's table, plus `index` (int, the number of the step, which
            selects its noise) and, for a guidance interval, `guide` (bool).
        carry: (latents float32 (b, h, w, c), the sampler's memory or None); with `preview` also
            the image latents that the last step predicted.
        key_data: keys to draw noise from, or None for a deterministic sampler.
        step_noise: (steps, b, h, w, c) used instead of drawn noise.
        renoise: see `Sampler`.
        known: what is put back before each step.
        preview: what the U-Net predicts, for a carry that holds the predicted image.

    Returns:
        The carry after the last row.
    """

    def body(carry, inputs):
        row, given = inputs
        x, memory = carry[:2]
        noise = given
        if given is None and key_data is not None:
            noise = draw_noise(key_data, row["index"] + 1, x.shape[1:])
        if known is not None:
            level = (1.0, 0.0) if renoise else (row["alpha"], row["sigma"])
            there = level[0] * known.latents + level[1] * known.noise
            x = known.mask * there + (1 - known.mask) * x
        if renoise:
            x = row["alpha"] * x + row["sigma"] * noise
        output = predict(x, row["timestep"], row.get("guide"))
        after = step(x, output, noise, row, memory)
        if preview is not None:
            after = (*after, predicted_image(preview, x, output, row))
        return after, None

    carry, _ = jax.lax.scan(body, carry, (rows, step_noise))
    return carry


def initial_carry(
    sampler: Sampler, latents: jax.Array, preview: bool = False
) -> tuple[jax.Array, ...]:
    """What `denoise` starts from."""
    carry = latents, (jnp.zeros_like(latents) if sampler.multistep else None)
    return (*carry, jnp.zeros_like(latents)) if preview else carry


def loop_rows(
    sampler: Sampler, guidance_interval: tuple[int, int] | None = None
) -> dict[str, np.ndarray]:
    """The sampler's table with the columns that `denoise` adds.

    Args:
        guidance_interval: first and last step (counted from 0, both included) that are guided, of
            the whole schedule also where only its last steps run: a step is guided or not by its
            noise level, whatever the strength.
    """
    index = np.arange(sampler.num_steps, dtype=np.int32)
    rows = {**sampler.rows, "index": index}
    if guidance_interval is not None:
        count = sampler.first_step + sampler.num_steps
        first, last = check_interval(guidance_interval, "guidance_interval", count)
        number = sampler.first_step + index
        rows["guide"] = (number >= first) & (number <= last)
    return rows


@functools.partial(jax.jit, static_argnames=("step", "renoise", "stochastic", "preview"))
def denoise_program(
    unet: UNet,
    context: Context | ReadContext,
    unconditional: Context | ReadContext | None,
    guidance_scale: jax.Array | None,
    extra_channels: jax.Array | None,
    carry: tuple[jax.Array, ...],
    rows: dict[str, jax.Array],
    key_data: jax.Array,
    step_noise: jax.Array | None,
    known: Known | None = None,
    *,
    step: Step,
    stochastic: bool,
    renoise: bool,
    preview: PredictionType | None = None,
) -> tuple[jax.Array, ...]:
    """`predictor` and `denoise` as one compiled program; the arguments are theirs."""
    predict = predictor(unet, context, unconditional, guidance_scale, extra_channels)
    return denoise(
        predict,
        step,
        rows,
        carry,
        key_data=key_data if stochastic else None,
        step_noise=step_noise if stochastic else None,
        renoise=renoise,
        known=known,
        preview=preview,
    )


def _interleave(*arrays: jax.Array) -> jax.Array:
    """Rows a0 b0 a1 b1 ...: each device of a split batch keeps its own samples."""
    rows = jnp.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])
    return constrain(rows, "batch", ...)
