# SPDX-License-Identifier: Apache-2.0
"""The images and masks of an inpainting call, checked and turned into what the loop takes."""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from k3jax.images.reading import resize_mask
from k3jax.pipelines.image_inputs import Size, to_work_size
from k3jax.pipelines.pipeline import BasePipeline
from k3jax.pipelines.programs import encode_masked, image_splits
from k3jax.pipelines.rows import ImageRows
from k3jax.sharding import fetch


class EmptyMaskWarning(UserWarning):
    """A mask under which nothing is to be repainted."""


class Pair(NamedTuple):
    """An image uint8 (h, w, 3), and its mask float32 (h, w), 1 where it is repainted."""

    image: np.ndarray
    mask: np.ndarray


def pairs(images: Sequence[np.ndarray], masks: Sequence[np.ndarray], count: int) -> list[Pair]:
    """`count` pairs of images and masks; where there is one, it goes with all.

    Raises:
        ValueError: a mask of another size than its image.
    """
    images, masks = (x if len(x) == count else list(x) * count for x in (images, masks))
    made = []
    for number, pair in enumerate(map(Pair, images, masks)):
        which = f" {number}" if count > 1 else ""
        if pair.image.shape[:2] != pair.mask.shape:
            (height, width), (mask_height, mask_width) = pair.image.shape[:2], pair.mask.shape
            raise ValueError(
                f"mask_image{which} is {mask_width} x {mask_height} pixels and its image "
                f"{width} x {height}: they must be of one size."
            )
        if not pair.mask.any():
            warnings.warn(
                f"mask_image{which} is empty (all black): nothing is repainted.",
                EmptyMaskWarning,
                stacklevel=3,
            )
        made.append(pair)
    return made


def prepare(
    pipe: BasePipeline,
    rows: ImageRows,
    inputs: Sequence[Pair],
    input_of: np.ndarray,
    size: Size,
    from_image: bool,
) -> ImageRows:
    """The rows of a group, with what the pipeline's method of inpainting takes besides.

    Args:
        input_of: of which input each row is made.
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

    A latent is as much to be repainted as the pixel that is most so of those it stands for.
    """
    b, height, width = repaint.shape
    cells = repaint.reshape(b, height // factor, factor, width // factor, factor)
    return (1 - cells.max((2, 4)))[..., None].astype(np.float32)


def _masked_channels(pipe: BasePipeline, images: np.ndarray, known: np.ndarray) -> np.ndarray:
    """float32 (b, h/8, w/8, 5): mask and latents of the masked image."""
    parts = []
    for index, kept in pipe.batches(len(images)):
        batch = pipe.put((images[index], known[index]))
        with pipe.computing(pipe.movq):
            splits = image_splits(pipe.mesh, len(index))
            parts.append(fetch(encode_masked(pipe.movq, *batch, splits=splits))[:kept])
    return np.concatenate(parts)
