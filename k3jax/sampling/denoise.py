# SPDX-License-Identifier: Apache-2.0
"""The denoising loop: noise and conditioning -> latents, as a `lax.scan` over the sampler's rows.

The compiled program has a fixed number of rows (`WINDOW`) and is called until all steps are done.
Rows that are left over are inactive and cost nothing. So the program does not depend on the number
of steps, on the strength of an edit, or on which steps are guided.

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
from k3jax.model.conditioning import Conditioning, interleave
from k3jax.model.unet import UNet
from k3jax.sampling.samplers import Sampler
from k3jax.sampling.steps import Step
from k3jax.sharding import constrain


Predict = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]

MAX_SEED = 2**64 - 1
WINDOW = 5
"""Rows of the compiled program. Between two calls the host shows progress and calls back, so few
are better for people; each call costs the host some 20 ms (a thousand weights are its arguments),
which the steps that are queued on the device must cover, so many are better for fast devices. 25
and 50 steps divide by it, and Flash's 4 take one call."""


class LoopState(NamedTuple):
    """What the loop carries from step to step, float32 (b, h, w, c) each.

    Attributes:
        latents: the noisy latents.
        prediction: the image latents that the last step predicted: what multistep samplers
            remember, and what previews show.
    """

    latents: jax.Array
    prediction: jax.Array


class PreservedRegion(NamedTuple):
    """Latents that replace the loop's own at every step, noised to its level; inpainting.

    Attributes:
        latents: (b, h, w, c).
        mask: (b, h, w, 1), 1 where they replace.
        noise: (b, h, w, c), the same at every step.
    """

    latents: jax.Array
    mask: jax.Array
    noise: jax.Array


def sample_keys(seeds: Sequence[int]) -> np.ndarray:
    """Random keys (threefry) from the seeds alone, as key data: uint32 (b, 2)."""
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


def predictor(unet: UNet, conditioning: Conditioning) -> Predict:
    """The U-Net with classifier-free guidance: (w + 1) conditional - w unconditional.

    Returns:
        predict(x, timestep, guide), x (b, h, w, 4), timestep a scalar, guide a scalar bool (None:
        always guide) that is true where this step runs the unconditional half.
    """

    def conditional(x, timestep):
        return unet(x, jnp.full(x.shape[:1], timestep), conditioning)

    if conditioning.unconditional is None:
        return lambda x, timestep, guide: conditional(x, timestep)

    pairs = conditioning.pairs()

    def guided(x, timestep):
        both = interleave(x, x)
        both = unet(both, jnp.full(both.shape[:1], timestep), pairs)
        both = constrain(both.reshape(-1, 2, *both.shape[1:]), "batch", ...)
        w = conditioning.guidance_scale[:, None, None, None]
        return (w + 1) * both[:, 0] - w * both[:, 1]

    def predict(x, timestep, guide):
        if guide is None:
            return guided(x, timestep)
        return jax.lax.cond(guide, guided, conditional, x, timestep)

    return predict


def denoise(
    predict: Predict,
    step: Step,
    rows: dict[str, jax.Array],
    state: LoopState,
    *,
    key_data: jax.Array | None,
    step_noise: jax.Array | None = None,
    renoise: bool = False,
    preserved: PreservedRegion | None = None,
) -> LoopState:
    """Scans a sampler's step over `rows` (all of its rows, or a run of them).

    Args:
        rows: columns of `loop_rows`, or of a `window` of them.
        state: from `initial_state`, or the state after the rows before these.
        key_data: keys to draw noise from, or None for a deterministic sampler.
        step_noise: (rows, b, h, w, c) used instead of drawn noise.
        renoise: see `Sampler`.
        preserved: what replaces a part of the latents before each step.

    Returns:
        The state after the last row.
    """

    @jax.named_scope("step")
    def run(state, row, noise):
        x = state.latents
        if noise is None and key_data is not None:
            noise = draw_noise(key_data, row["index"] + 1, x.shape[1:])
        if preserved is not None:
            alpha, sigma = (1.0, 0.0) if renoise else (row["alpha"], row["sigma"])
            noised = alpha * preserved.latents + sigma * preserved.noise
            x = preserved.mask * noised + (1 - preserved.mask) * x
        if renoise:
            x = row["alpha"] * x + row["sigma"] * noise
        output = predict(x, row["timestep"], row.get("guide"))
        new = LoopState(*step(x, output, noise, row, state.prediction))
        return jax.tree.map(lambda x: constrain(x, "batch", ...), new)

    def body(state, inputs):
        row, noise = inputs
        if "active" not in row:
            return run(state, row, noise), None
        return jax.lax.cond(row["active"], run, lambda state, *_: state, state, row, noise), None

    state, _ = jax.lax.scan(body, state, (rows, step_noise))
    return state


def initial_state(latents: jax.Array) -> LoopState:
    """What `denoise` starts from."""
    return LoopState(latents, jnp.zeros_like(latents))


def loop_rows(
    sampler: Sampler, guidance_interval: tuple[int, int] | None = None
) -> dict[str, np.ndarray]:
    """The sampler's table with the columns that `denoise` adds.

    They are `index`, the number of the step, which selects its noise, and with an interval `guide`.
    Without an interval every step is guided and the program is another one: it has no unguided
    branch, which would take as long to compile as the guided one.

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


def window(
    rows: dict[str, np.ndarray], step_noise: np.ndarray | None, first: int, count: int
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """`count` rows and their noise from row `first`, and inactive ones up to WINDOW.

    Args:
        count: at most WINDOW.
    """
    number = np.arange(WINDOW)
    index = first + np.minimum(number, count - 1)
    padded = {name: column[index] for name, column in rows.items()} | {"active": number < count}
    return padded, None if step_noise is None else step_noise[index]


@functools.partial(jax.jit, static_argnames=("step", "renoise"))
def denoise_program(
    unet: UNet,
    conditioning: Conditioning,
    state: LoopState,
    rows: dict[str, jax.Array],
    key_data: jax.Array | None,
    step_noise: jax.Array | None,
    preserved: PreservedRegion | None = None,
    *,
    step: Step,
    renoise: bool,
) -> LoopState:
    """`predictor` and `denoise` as one compiled program; the arguments are theirs."""
    return denoise(
        predictor(unet, conditioning),
        step,
        rows,
        state,
        key_data=key_data,
        step_noise=step_noise,
        renoise=renoise,
        preserved=preserved,
    )
