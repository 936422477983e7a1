# SPDX-License-Identifier: Apache-2.0
"""The inputs of calls that start from images: sizes, steps, masks, and groups of one size."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from k3jax.arguments import warn_user
from k3jax.config import ModelConfig
from k3jax.images.compositing import work_size
from k3jax.images.masks import read_masks, resize_mask
from k3jax.images.reading import read_images, resize_image
from k3jax.pipelines.call_inputs import (
    CallInputs,
    Size,
    check_latents,
    check_size,
    size_multiple,
)
from k3jax.pipelines.options import ImageToImageOptions, InpaintOptions
from k3jax.pipelines.pipeline import BasePipeline
from k3jax.pipelines.programs import encode_masked
from k3jax.pipelines.rows import ImageRows


def work_sizes(
    config: ModelConfig, images: Sequence[np.ndarray], max_area: int | None
) -> list[Size]:
    """The size at which each image is worked on.

    Args:
        max_area: pixels; None: as many as an image of the checkpoint's own size has.

    Raises:
        ValueError: an image, or an area, that cannot be.
    """
    multiple = size_multiple(config)
    area = config.sample_size**2 if max_area is None else max_area
    if area < multiple**2:
        raise ValueError(f"max_area is {area}; it must be at least {multiple} x {multiple} pixels.")
    return [work_size(image.shape[1], image.shape[0], area, multiple) for image in images]


class ImageToImageInputs(CallInputs):
    """The inputs of a call that changes images.

    Attributes:
        images: as read, uint8 (h, w, 3) each; None where `image_latents` are given.
        image_latents: float32 (b, h/8, w/8, 4), or None.
        image_of: the image of each result.
    """

    def __init__(self, options: ImageToImageOptions, config: ModelConfig):
        """
        Raises:
            ValueError: one sentence on the argument that is wrong.
        """
        if (options.image is None) == (options.image_latents is None):
            raise ValueError("give image, or image_latents instead of it.")
        self.images = self.image_latents = None
        if options.image is not None:
            self.images = read_images(options.image)
            sizes = work_sizes(config, self.images, options.max_area)
        else:
            self.image_latents = check_latents(options.image_latents, config, "image_latents")
            sizes = _sizes_of_latents(self.image_latents, config)
        super().__init__(options, config, sizes, {"images": len(sizes)})
        self.image_of = self._repeated(len(sizes))


class InpaintInputs(CallInputs):
    """The inputs of a call that repaints a part of images.

    Attributes:
        pairs: the image and the mask of each input.
    """

    def __init__(self, options: InpaintOptions, config: ModelConfig):
        """
        Raises:
            ValueError: one sentence on the argument that is wrong.
        """
        for name in ("image", "mask_image"):
            if getattr(options, name) is None:
                raise ValueError(f"give {name}.")
        images, masks = read_images(options.image), read_masks(options.mask_image)
        sizes = work_sizes(config, images, options.max_area)
        super().__init__(options, config, sizes, {"images": len(images), "masks": len(masks)})
        self.pairs = pairs(images, masks, self.num_inputs)
        if 0 in self.steps:
            raise ValueError("strength is 0, which repaints nothing: give more.")


def _sizes_of_latents(latents: np.ndarray, config: ModelConfig) -> list[Size]:
    height, width = (side * config.movq.scale_factor for side in latents.shape[1:3])
    check_size(config, height, width)
    return [(width, height)] * len(latents)


def to_work_size(image: np.ndarray, size: Size) -> np.ndarray:
    """uint8 (h, w, 3) of the size to work at; bicubic, as the original resizes."""
    return resize_image(image, *size, Image.Resampling.BICUBIC)


def to_own_size(result: np.ndarray, image: np.ndarray) -> np.ndarray:
    """A result in the size of its image. It is resized as floats, whatever its dtype."""
    height, width = image.shape[:2]
    if result.shape[:2] == (height, width):
        return result
    floats = result / np.float32(255) if result.dtype == np.uint8 else result
    resized = resize_image(floats, width, height, Image.Resampling.LANCZOS)
    return np.rint(resized * 255).astype(np.uint8) if result.dtype == np.uint8 else resized


class EmptyMaskWarning(UserWarning):
    """A mask that is all black: nothing is repainted."""


class Pair(NamedTuple):
    """An image uint8 (h, w, 3), and its mask float32 (h, w), 1 where it is repainted."""

    image: np.ndarray
    mask: np.ndarray


def pairs(images: Sequence[np.ndarray], masks: Sequence[np.ndarray], count: int) -> list[Pair]:
    """`count` pairs of images and masks; a single image or mask is paired with all.

    Raises:
        ValueError: a mask of another size than its image.
    """
    images, masks = (x if len(x) == count else list(x) * count for x in (images, masks))
    found = []
    for number, pair in enumerate(map(Pair, images, masks)):
        which = f" {number}" if count > 1 else ""
        if pair.image.shape[:2] != pair.mask.shape:
            (height, width), (mask_height, mask_width) = pair.image.shape[:2], pair.mask.shape
            raise ValueError(
                f"mask_image{which} is {mask_width} x {mask_height} pixels and its image "
                f"{width} x {height}: they must be of one size."
            )
        if not pair.mask.any():
            warn_user(
                f"mask_image{which} is empty (all black): nothing is repainted.",
                EmptyMaskWarning,
            )
        found.append(pair)
    return found


def inpainting_rows(
    pipe: BasePipeline,
    rows: ImageRows,
    inputs: Sequence[Pair],
    input_of: np.ndarray,
    size: Size,
    from_image: bool,
) -> ImageRows:
    """The rows of a group with the inputs of the pipeline's method of inpainting.

    Args:
        input_of: the input of each row.
        size: (width, height) at which they are worked on.
        from_image: whether sampling starts from the image.
    """
    distinct, place = np.unique(input_of, return_inverse=True)
    images = np.stack([to_work_size(inputs[i].image, size) for i in distinct])
    repaint = np.stack([resize_mask(inputs[i].mask, *size) for i in distinct])
    blends = pipe.config.unet.in_channels == pipe.config.movq.latent_channels
    latents = pipe.encode_arrays(images)[place] if blends or from_image else None
    if from_image:
        rows = rows.starting_from(latents)
    if blends:
        mask = known_latents(repaint, pipe.config.movq.scale_factor)
        return dataclasses.replace(rows, known=latents, known_mask=mask[place])
    extra = _masked_channels(pipe, images, (1 - repaint).astype(np.float32))
    return dataclasses.replace(rows, extra_channels=extra[place])


def known_latents(repaint: np.ndarray, factor: int) -> np.ndarray:
    """Masks (b, h, w), 1 repainted -> float32 (b, h/8, w/8, 1), 1 where a latent is known whole.

    A latent has the largest mask value of the pixels that it covers.
    """
    b, height, width = repaint.shape
    cells = repaint.reshape(b, height // factor, factor, width // factor, factor)
    return (1 - cells.max((2, 4)))[..., None].astype(np.float32)


def _masked_channels(pipe: BasePipeline, images: np.ndarray, known: np.ndarray) -> np.ndarray:
    """float32 (b, h/8, w/8, 5): mask and latents of the masked image."""
    program = functools.partial(pipe.run_movq, encode_masked)
    return pipe.in_batches(program, images, known)
