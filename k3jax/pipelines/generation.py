# SPDX-License-Identifier: Apache-2.0
"""The images of a call, batch by batch: contexts, the denoising loop, decoding."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from k3jax.arguments import whole_number
from k3jax.pipelines.call_inputs import OutputType
from k3jax.pipelines.pipeline import BasePipeline
from k3jax.pipelines.preview import StepPreview, preview_map
from k3jax.pipelines.programs import (
    add_noise,
    initial_latents,
    make_contexts,
    put_back,
    read_contexts,
)
from k3jax.pipelines.rows import ImageGroup, ImageRows
from k3jax.sampling.denoise import Known, denoise_program, initial_carry, loop_rows
from k3jax.sampling.samplers import Sampler
from k3jax.sharding import fetch


Callback = Callable[[StepPreview], Any]


@dataclass(frozen=True)
class Loop:
    """How the loop of a call runs, the same for all of its images.

    Attributes:
        guidance_interval: first and last guided step of the whole schedule, or None for all.
        callback: is given a `StepPreview` of each batch every `callback_steps` steps.
        progress_bar: whether to show one.
    """

    guidance_interval: tuple[int, int] | None = None
    callback: Callback | None = None
    callback_steps: int = 1
    progress_bar: bool = True

    def check(self, sampler: Sampler) -> None:
        """Raises ValueError for settings that cannot be."""
        loop_rows(sampler, self.guidance_interval)
        whole_number(self.callback_steps, "callback_steps", least=1)


def make_images(
    pipe: BasePipeline, groups: Sequence[ImageGroup], loop: Loop, output_type: OutputType
) -> dict[int, np.ndarray]:
    """The images of groups by their numbers: uint8 for "pil", float32, or latents for "latent"."""
    made: dict[int, np.ndarray] = {}
    size = pipe.batch_size
    total = sum(-(-len(group.index) // size) * group.sampler.num_steps for group in groups)
    decoded = output_type != "latent"
    shapes = {group.shape for group in groups} if decoded else ()
    # The decoder takes nearly as long to compile as the loop: both at once.
    with (
        ThreadPoolExecutor(1) as beside,
        tqdm(total=total, unit="step", disable=not loop.progress_bar, leave=False) as bar,
    ):
        compiled = {
            shape: beside.submit(pipe.compile_decoder, shape, output_type) for shape in shapes
        }
        for group in groups:
            for index, kept in pipe.batches(len(group.index)):
                images = group.images.rows(index)
                numbers = group.index[index][:kept]
                latents = _sample(pipe, images, group, loop, numbers, bar)
                if decoded:
                    compiled[group.shape].result()
                    latents = pipe.decode_batch(latents, output_type)
                made |= zip(numbers.tolist(), fetch(latents), strict=False)
    return made


def _sample(
    pipe: BasePipeline,
    batch: ImageRows,
    group: ImageGroup,
    loop: Loop,
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
    rows = loop_rows(sampler, loop.guidance_interval)
    if not guided:
        rows = {name: column for name, column in rows.items() if name != "guide"}
    keys = pipe.put(batch.key_data)
    noise = _noise(pipe, batch, keys, group.shape)
    known = None
    if batch.known is not None:
        latents, mask = (pipe.put(x.astype(np.float32)) for x in (batch.known, batch.known_mask))
        known = Known(latents, mask, pipe.put(noise))
    preview = None if loop.callback is None else sampler.prediction_type
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
    window = _window(sampler.num_steps, loop)
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
        if preview is not None and done % loop.callback_steps == 0:
            timestep = float(rows["timestep"][done - 1])
            predicted = fetch(carry[2])[: len(numbers)]
            colors = preview_map(pipe)
            steps = done, sampler.num_steps
            loop.callback(StepPreview(*steps, timestep, numbers, predicted, colors))
    jax.block_until_ready(carry[0])
    bar.update(window)
    latents = carry[0]
    return latents if known is None else pipe.put(put_back(latents, known.latents, known.mask))


def _noise(pipe: BasePipeline, batch: ImageRows, keys: jax.Array, shape) -> jax.Array:
    if batch.latents is not None:
        return pipe.put(batch.latents.astype(np.float32))
    return initial_latents(keys, shape=shape)


def _window(num_steps: int, loop: Loop) -> int:
    """Steps per call of the compiled loop: about a fifth of them, dividing them evenly.

    Between the calls the host can show progress. A callback from inside the scan would do so too,
    but programs with host callbacks are left out of the persistent compilation cache.
    """
    fifth = next(w for w in range(max(num_steps // 5, 1), 0, -1) if num_steps % w == 0)
    return fifth if loop.callback is None else math.gcd(fifth, int(loop.callback_steps))
