# SPDX-License-Identifier: Apache-2.0
"""The images of a call, batch by batch: contexts, the denoising loop, decoding."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from tqdm.auto import tqdm

from k3jax.pipelines.options import CallOptions
from k3jax.pipelines.pipeline import BasePipeline
from k3jax.pipelines.preview import StepPreview
from k3jax.pipelines.programs import (
    add_noise,
    initial_latents,
    make_contexts,
    put_back,
    read_contexts,
)
from k3jax.pipelines.rows import ImageGroup, ImageRows
from k3jax.sampling.denoise import Known, denoise_program, initial_carry, loop_rows
from k3jax.sharding import fetch


def make_images(
    pipe: BasePipeline, groups: Sequence[ImageGroup], options: CallOptions
) -> dict[int, np.ndarray]:
    """The images of groups by their numbers: uint8 for "pil", float32, or latents for "latent"."""
    made: dict[int, np.ndarray] = {}
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
                made |= zip(numbers.tolist(), fetch(latents), strict=False)
    return made


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
        contexts = read_contexts(pipe.unet, context, unconditional if guided else None)
    rows = loop_rows(sampler, options.guidance_interval)
    if not guided:
        rows = {name: column for name, column in rows.items() if name != "guide"}
    keys = pipe.put(batch.key_data)
    noise = _noise(pipe, batch, keys, group.shape)
    known = None
    if batch.known is not None:
        latents, mask = (pipe.put(x.astype(np.float32)) for x in (batch.known, batch.known_mask))
        known = Known(latents, mask, pipe.put(noise))
    preview = None if options.callback is None else sampler.prediction_type
    start = noise
    if batch.start is not None:
        start = pipe.put(batch.start.astype(np.float32))
        if not sampler.renoise:  # else the loop does it
            start = add_noise(start, noise, rows["alpha"][0], rows["sigma"][0])

    # Put where they belong before each call: the compiler may leave its results split in
    # another way, which as arguments would make another program.
    carry = pipe.put(initial_carry(sampler, start, preview is not None))
    guidance_scale = pipe.put(batch.guidance_scale) if guided else None
    extra_channels = None if batch.extra_channels is None else pipe.put(batch.extra_channels)
    window = _window(sampler.num_steps, options)
    for first in range(0, sampler.num_steps, window):
        part = slice(first, first + window)
        given = None if batch.step_noise is None else batch.step_noise[part]
        with pipe.computing(pipe.unet):
            after = denoise_program(
                pipe.unet,
                *contexts,
                guidance_scale,
                extra_channels,
                carry,
                {name: column[part] for name, column in rows.items()},
                keys,
                None if given is None else pipe.put(given, batch_dim=1),
                known,
                step=sampler.step,
                stochastic=sampler.stochastic,
                renoise=sampler.renoise,
                preview=preview,
            )
        # Waits for the window before this one, so that the device always has the next queued.
        jax.block_until_ready(carry[0])
        bar.update(0 if first == 0 else window)
        carry = pipe.put(after)
        done = first + window
        if preview is not None and done % options.callback_steps == 0:
            timestep = float(rows["timestep"][done - 1])
            predicted = fetch(carry[2])[: len(numbers)]
            colors = pipe.preview_map()
            steps = done, sampler.num_steps
            options.callback(StepPreview(*steps, timestep, numbers, predicted, colors))
    jax.block_until_ready(carry[0])
    bar.update(window)
    latents = carry[0]
    return latents if known is None else pipe.put(put_back(latents, known.latents, known.mask))


def _noise(pipe: BasePipeline, batch: ImageRows, keys: jax.Array, shape) -> jax.Array:
    if batch.latents is not None:
        return pipe.put(batch.latents.astype(np.float32))
    return initial_latents(keys, shape=shape)


def _window(num_steps: int, options: CallOptions) -> int:
    """Steps per call of the compiled loop: about a fifth of them, dividing them evenly.

    Between the calls the host can show progress. A callback from inside the scan would do so too,
    but programs with host callbacks are left out of the persistent compilation cache.
    """
    fifth = next(w for w in range(max(num_steps // 5, 1), 0, -1) if num_steps % w == 0)
    return fifth if options.callback is None else math.gcd(fifth, options.callback_steps)
