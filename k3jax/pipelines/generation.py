# SPDX-License-Identifier: Apache-2.0
"""The images of a call, batch by batch: contexts, the denoising loop, decoding."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from tqdm.auto import tqdm

from k3jax.model.conditioning import Conditioning
from k3jax.pipelines.options import CallOptions
from k3jax.pipelines.pipeline import BasePipeline
from k3jax.pipelines.preview import StepPreview
from k3jax.pipelines.programs import (
    add_noise,
    context_caches,
    initial_latents,
    make_contexts,
    put_back,
)
from k3jax.pipelines.rows import ImageGroup, ImageRows
from k3jax.sampling.denoise import (
    WINDOW,
    PreservedRegion,
    denoise_program,
    initial_state,
    loop_rows,
    window,
)
from k3jax.sampling.samplers import Sampler
from k3jax.sharding import fetch


def make_images(
    pipe: BasePipeline, groups: Sequence[ImageGroup], options: CallOptions
) -> dict[int, np.ndarray]:
    """The images of groups by their numbers: uint8 for "pil", float32, or latents for "latent"."""
    results: dict[int, np.ndarray] = {}
    size = pipe.batch_size
    total = sum(-(-len(group.index) // size) * group.sampler.num_steps for group in groups)
    decoded = options.output_type != "latent"
    shapes = {group.shape for group in groups} if decoded else ()
    # The decoder takes nearly as long to compile as the loop: both at once.
    with (
        ThreadPoolExecutor(1) as beside,
        tqdm(total=total, unit="step", disable=not options.progress_bar, leave=False) as bar,
    ):
        kind = options.output_type
        compiled = {shape: beside.submit(pipe.compile_decoder, shape, kind) for shape in shapes}
        for group in groups:
            for index, kept in pipe.batches(len(group.index)):
                images = group.images.rows(index)
                numbers = group.index[index][:kept]
                latents = _sample(pipe, images, group, options, numbers, bar)
                if decoded:
                    compiled[group.shape].result()
                    latents = pipe.decode_batch(latents, kind)
                results |= zip(numbers.tolist(), fetch(latents), strict=False)
    return results


def _sample(
    pipe: BasePipeline,
    batch: ImageRows,
    group: ImageGroup,
    options: CallOptions,
    numbers: np.ndarray,
    bar: tqdm,
) -> jax.Array:
    """The latents of one compiled batch, on the devices."""
    sampler = group.sampler
    conditioning = _conditioning(pipe, batch, sampler)
    guided = conditioning.unconditional is not None
    rows = loop_rows(sampler, options.guidance_interval if guided else None)
    keys = pipe.put(batch.key_data)
    noise = _noise(pipe, batch, keys, group.shape)
    preserved = None
    if batch.known is not None:
        latents, mask = (pipe.put(x.astype(np.float32)) for x in (batch.known, batch.known_mask))
        preserved = PreservedRegion(latents, mask, pipe.put(noise))
    start = noise
    if batch.start is not None:
        start = pipe.put(batch.start.astype(np.float32))
        if not sampler.renoise:  # else the loop does it
            start = add_noise(start, noise, rows["alpha"][0], rows["sigma"][0])

    # Placed before each call: the compiler may leave its results split in another way, which as
    # arguments would make another program.
    state = pipe.put(initial_state(start))
    done = bar_steps = 0
    while done < sampler.num_steps:
        count = _steps_in_a_row(done, sampler.num_steps, options)
        part, step_noise = window(rows, batch.step_noise, done, count)
        with pipe.computing(pipe.unet):
            new = denoise_program(
                pipe.unet,
                conditioning,
                state,
                part,
                keys if sampler.stochastic else None,
                pipe.put(step_noise, batch_dim=1) if sampler.stochastic else None,
                preserved,
                step=sampler.step,
                renoise=sampler.renoise,
            )
        # Waits for the window before this one, so that the device always has the next queued.
        jax.block_until_ready(state.latents)
        bar.update(done - bar_steps)
        bar_steps, done = done, done + count
        state = pipe.put(new)
        if options.callback is not None and done % options.callback_steps == 0:
            timestep = float(rows["timestep"][done - 1])
            predicted = fetch(state.prediction)[: len(numbers)]
            steps = done, sampler.num_steps
            options.callback(StepPreview(*steps, timestep, numbers, predicted, pipe.preview_map()))
    jax.block_until_ready(state.latents)
    bar.update(done - bar_steps)
    latents = state.latents
    if preserved is None:
        return latents
    return pipe.put(put_back(latents, preserved.latents, preserved.mask))


def _conditioning(pipe: BasePipeline, batch: ImageRows, sampler: Sampler) -> Conditioning:
    """All inputs of the U-Net other than latents and time, on the devices."""
    guided = sampler.guided and bool((batch.guidance_scale > 0).any())
    with pipe.computing(pipe.text_projection):
        context, unconditional = make_contexts(
            pipe.text_projection,
            pipe.put(batch.prompt),
            pipe.put(batch.negative),
            pipe.put(batch.has_negative),
            conditioning=pipe.config.conditioning,
        )
    with pipe.computing(pipe.unet):
        caches = context_caches(pipe.unet, context, unconditional if guided else None)
    return Conditioning(
        *caches,
        guidance_scale=pipe.put(batch.guidance_scale) if guided else None,
        extra_channels=pipe.put(batch.extra_channels),
    )


def _noise(pipe: BasePipeline, batch: ImageRows, keys: jax.Array, shape) -> jax.Array:
    if batch.latents is not None:
        return pipe.put(batch.latents.astype(np.float32))
    return initial_latents(keys, shape=shape)


def _steps_in_a_row(done: int, num_steps: int, options: CallOptions) -> int:
    """How many steps the program runs before the host has a turn.

    A callback from inside the program would do without these turns, but programs with host
    callbacks are left out of the persistent compilation cache.
    """
    count = min(WINDOW, num_steps - done)
    if options.callback is None:
        return count
    return min(count, options.callback_steps - done % options.callback_steps)
