# SPDX-License-Identifier: Apache-2.0
"""What the tasks that start from images have in common: sizes, groups of one size, results in the
images' own sizes."""

import warnings
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from k3jax.arguments import whole_number
from k3jax.config import ModelConfig
from k3jax.images.reading import resize_image
from k3jax.images.sizes import work_size
from k3jax.pipelines import request
from k3jax.pipelines.calls import Call
from k3jax.sampling.samplers import Sampler, last_steps, steps_of_strength


Size = tuple[int, int]
"""(width, height) in pixels."""


def work_sizes(
    config: ModelConfig, images: Sequence[np.ndarray], max_area: int | None
) -> list[Size]:
    """The size at which each image is worked on.

    Args:
        max_area: pixels; None: as many as an image of the checkpoint's own size has.

    Raises:
        ValueError: an image, or an area, that cannot be.
    """
    multiple = request.size_multiple(config)
    area = config.sample_size**2 if max_area is None else whole_number(max_area, "max_area")
    if area < multiple**2:
        raise ValueError(f"max_area is {area}; it must be at least {multiple} x {multiple} pixels.")
    return [work_size(image.shape[1], image.shape[0], area, multiple) for image in images]


def strengths(strength: float | Sequence[float], count: int) -> list[float]:
    """One strength for each of `count` inputs."""
    values = np.asarray(strength, np.float64)
    if values.shape not in ((), (count,)):
        raise ValueError(f"strength has {values.size} entries for {count} images.")
    return np.broadcast_to(values, (count,)).tolist()


def step_counts(call: Call, values: Iterable[float]) -> list[int]:
    """Steps for each strength; see `steps_of_strength`.

    Warns where a guidance interval ends before the steps that are left begin.
    """
    total, interval = call.sampler.num_steps, call.guidance_interval
    counts = []
    for value in values:
        count = steps_of_strength(value, total)
        if count and call.guided and interval is not None and interval[1] < total - count:
            warnings.warn(
                f"guidance_interval {interval} guides none of the steps {total - count} to "
                f"{total - 1} that strength {value:g} leaves: it counts the steps of the whole "
                "schedule.",
                stacklevel=3,
            )
        counts.append(count)
    return counts


def groups(
    call: Call, sizes: Sequence[Size], steps: Sequence[int]
) -> Iterable[tuple[Size, Sampler | None, np.ndarray]]:
    """(size, sampler or None for no steps, which images of the call) that can be made together.

    Args:
        sizes, steps: of each input.
    """
    of_image = np.repeat(np.arange(call.num_inputs), call.num_images_per_prompt)
    keys = [(sizes[i], steps[i]) for i in of_image]
    for size, count in dict.fromkeys(keys):
        index = np.array([n for n, key in enumerate(keys) if key == (size, count)])
        yield size, last_steps(call.sampler, count) if count else None, index


def check_given_noise(
    call: Call,
    latents: np.ndarray | None,
    step_noise: np.ndarray | None,
    sizes: Sequence[Size],
    steps: Sequence[int],
    config: ModelConfig,
) -> None:
    """Noise that a caller brings fits only images of one size that take the same steps."""
    if latents is None and step_noise is None:
        return
    if len(set(sizes)) > 1 or len(set(steps)) > 1:
        raise ValueError(
            "latents and step_noise are for images of one size and strength; these differ."
        )
    request.check_noise(latents, step_noise, latent_shape(config, sizes[0]), call.count, steps[0])


def latent_shape(config: ModelConfig, size: Size) -> tuple[int, int, int]:
    """(h/8, w/8, 4) of an image of a size."""
    factor = config.movq.scale_factor
    return size[1] // factor, size[0] // factor, config.movq.latent_channels


def to_work_size(image: np.ndarray, size: Size) -> np.ndarray:
    """uint8 (h, w, 3) of the size to work at; bicubic, as the original resizes."""
    return resize_image(image, *size, Image.Resampling.BICUBIC)


def to_own_size(made: np.ndarray, image: np.ndarray) -> np.ndarray:
    """A result in the size of the image that was given; in floats, so that every kind is alike."""
    height, width = image.shape[:2]
    if made.shape[:2] == (height, width):
        return made
    floats = made / np.float32(255) if made.dtype == np.uint8 else made
    resized = resize_image(floats, width, height, Image.Resampling.LANCZOS)
    return np.rint(resized * 255).astype(np.uint8) if made.dtype == np.uint8 else resized
