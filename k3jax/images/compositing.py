# SPDX-License-Identifier: Apache-2.0
"""Sizes to work at, known pixels pasted back over results, and larger canvases for images."""

from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from k3jax.arguments import whole_number
from k3jax.images.reading import read_image


MOST_PIXELS = 2**28  # of a canvas

MAX_RATIO = 16
"""Largest ratio of the sides of an image that must be enlarged."""


def work_size(width: int, height: int, max_area: int, multiple: int) -> tuple[int, int]:
    """(width, height) in multiples of `multiple` at which an image is worked on.

    Images of more than `max_area` pixels are made smaller; then each side is cut to a multiple, as
    in the original (ai-forever/Kandinsky-3, utils.py). What is smaller than one multiple is
    enlarged to it, which the original cannot do.

    Raises:
        ValueError: an image too long and thin to be enlarged so.
    """
    factor = max(1.0, (width * height / max_area) ** 0.5)
    sides = [round(side / factor) // multiple * multiple for side in (width, height)]
    if min(sides) > 0:
        return sides[0], sides[1]
    short, long = sorted((width, height))
    if long > MAX_RATIO * short:
        raise ValueError(
            f"the image is {width} x {height} pixels: too long and thin to be worked on at "
            f"multiples of {multiple} pixels; cut it into parts, or give it wider sides."
        )
    scale = multiple / short
    sides = [max(round(side * scale) // multiple, 1) * multiple for side in (width, height)]
    return sides[0], sides[1]


def default_feather(shape: tuple[int, ...], size: tuple[int, int], factor: int) -> float:
    """Pixels of an image (h, w, ...) that one latent covers, worked on at (width, height)."""
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


def paste_known(result: np.ndarray, image: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The generated image over the original one, which is unchanged where the share is 0.

    Args:
        result: uint8, or float32 in [0, 1], (h, w, 3).
        image: uint8 (h, w, 3).
    """
    share = share[..., None]
    if result.dtype == np.uint8:
        mixed = share * result + (1 - share) * image
        return np.rint(mixed).astype(np.uint8)
    known = image.astype(np.float32) / np.float32(255)
    return np.where(share > 0, share * result + (1 - share) * known, known)


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
        sides[name] = whole_number(pixels, name, least=0)
    if not any(sides.values()):
        raise ValueError("give the pixels to add on at least one of left, top, right, bottom.")
    height, width = array.shape[:2]
    height, width = height + sides["top"] + sides["bottom"], width + sides["left"] + sides["right"]
    if height * width > MOST_PIXELS:
        raise ValueError(
            f"the canvas of {width} x {height} pixels is too large (the most is "
            f"{MOST_PIXELS:,} pixels): make left, top, right or bottom smaller."
        )
    around = ((sides["top"], sides["bottom"]), (sides["left"], sides["right"]))
    canvas = np.pad(array, (*around, (0, 0)), mode="edge")
    mask = np.pad(np.zeros(array.shape[:2], np.uint8), around, constant_values=255)
    return Image.fromarray(canvas), Image.fromarray(mask)
