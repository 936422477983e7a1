# SPDX-License-Identifier: Apache-2.0
"""Known pixels put back over what a model made, and canvases that are larger than their image."""

from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from k3jax.images.reading import read_image


def default_feather(shape: tuple[int, ...], size: tuple[int, int], factor: int) -> float:
    """The pixels of an image (h, w, ...) that one latent covers, worked on at (width, height)."""
    return factor * max(1.0, shape[1] / size[0], shape[0] / size[1])


def generated_share(mask: np.ndarray, feather: float) -> np.ndarray:
    """How much of each pixel is the generated image's, float32 (h, w).

    1 where the mask is 1, falling to 0 over `feather` pixels around that; a soft mask's own
    fraction where that is more. 0 everywhere else.
    """
    whole = mask >= 1
    if not feather or not whole.any() or whole.all():
        return mask
    distance = ndimage.distance_transform_edt(~whole)
    return np.maximum(mask, 1 - distance / (feather + 1)).clip(0, 1).astype(np.float32)


def paste_known(made: np.ndarray, image: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The generated image over the given one, which stays exactly where the share is 0.

    Args:
        made: uint8, or float32 in [0, 1], (h, w, 3).
        image: uint8 (h, w, 3).
    """
    share = share[..., None]
    if made.dtype == np.uint8:
        mixed = share * made + (1 - share) * image
        return np.rint(mixed).astype(np.uint8)
    given = image.astype(np.float32) / np.float32(255)
    return np.where(share > 0, share * made + (1 - share) * given, given)


def extend_canvas(
    image: Any, *, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0
) -> tuple[Image.Image, Image.Image]:
    """A larger canvas around an image and the mask of what is new: outpainting is inpainting of it.

    Args:
        image: a path, PIL image or array.
        left, top, right, bottom: pixels to add on each side.

    Returns:
        (canvas, its border continued into the new part; mask, white there).

    Raises:
        ValueError: an image that cannot be read, or sides that are negative or all 0.
    """
    array = read_image(image)
    sides = {"left": left, "top": top, "right": right, "bottom": bottom}
    for name, pixels in sides.items():
        if not isinstance(pixels, int | np.integer) or pixels < 0:
            raise ValueError(f"{name} is {pixels}; it must be a whole number of pixels, 0 or more.")
    if not any(sides.values()):
        raise ValueError("give the pixels to add on at least one of left, top, right, bottom.")
    around = ((top, bottom), (left, right))
    canvas = np.pad(array, (*around, (0, 0)), mode="edge")
    mask = np.pad(np.zeros(array.shape[:2], np.uint8), around, constant_values=255)
    return Image.fromarray(canvas), Image.fromarray(mask)
