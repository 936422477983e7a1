# SPDX-License-Identifier: Apache-2.0
"""Masks as arrays of one form: float32 (h, w), 1 where a pixel is repainted.

Masks may be drawn in a colour on black, which counts as white.
"""

from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from k3jax.images.decoding import decoding
from k3jax.images.reading import (
    numbers_of,
    one_by_one,
    opened_image,
    pixel_array,
    to_rgba,
    to_uint8_rgb,
)


NOISE = 1 / 16
"""Share of the range by which a mask of whole numbers may differ from black or white and still
count as it: the compression of a JPEG must not mark everything as a little to be repainted."""

GREY = 1 / 16
"""Largest difference of a pixel's channels in a grey image, as a share of the brightest."""

SAME = 1 / 5
"""Largest distance of a pixel from a shade of the mask's colour, as a share of the brightest."""

BLUR = 8
"""Pixels on both sides of an edge in which a JPEG mixes the colours."""


def read_mask(mask: Any, name: str = "mask_image") -> np.ndarray:
    """One mask as float32 (h, w): 1 (white) is repainted, 0 (black) kept.

    Booleans, 0/1 and 0/255 (or 0/65535) mean the same; fractions are kept. One colour on black
    counts as white on black, whatever colour it is and whether or not it has a palette.

    Raises:
        ValueError: one sentence on what it is instead.
    """
    opened, name = opened_image(mask, name)
    if isinstance(opened, Image.Image):
        opened = _mask_from_pil(opened, name)
    array = pixel_array(opened, name)
    if array.ndim == 3 and array.shape[2] in (1, 3) and (array == array[:, :, :1]).all():
        array = array[:, :, 0]
    elif array.ndim == 3 and array.shape[2] in (3, 4):
        array = _without_color(array, name)
    if array.ndim != 2:
        raise ValueError(f"{name} has shape {array.shape}; a mask is (height, width).")
    return _shares(array, name)


def read_masks(masks: Any, name: str = "mask_image") -> list[np.ndarray]:
    """One mask or several as a list of float32 (h, w) that is not empty."""
    return [read_mask(one, where) for one, where in one_by_one(masks, name, (2, 3))]


def resize_mask(mask: np.ndarray, width: int, height: int) -> np.ndarray:
    """A mask in another size, as the original's skimage.transform.resize of numbers does it."""
    if mask.shape == (height, width):
        return mask
    zoom = (height / mask.shape[0], width / mask.shape[1])
    resized = ndimage.zoom(mask.astype(np.float64), zoom, order=1, mode="mirror", grid_mode=True)
    return np.clip(resized, mask.min(), mask.max()).astype(np.float32)


def _mask_from_pil(mask: Image.Image, name: str) -> np.ndarray:
    """Numbers (h, w) in any range."""
    if mask.mode.startswith("I") or mask.mode == "F":
        return numbers_of(mask)
    with decoding(name):
        if mask.has_transparency_data:
            mask = to_rgba(mask)
        elif mask.mode not in ("1", "L"):
            mask = mask.convert("RGB")
    array = np.asarray(mask)
    return array if array.ndim == 2 else _without_color(array, name)


def _without_color(mask: np.ndarray, name: str) -> np.ndarray:
    """A mask (h, w, 3) or (h, w, 4) as uint8 (h, w); a colour on black counts as white."""
    if mask.shape[2] == 4 and to_uint8_rgb(mask[..., 3:], name).min() < 255:
        raise ValueError(
            f"{name} is transparent in places, which can mean both: give a mask in black "
            "(kept) and white (repainted)."
        )
    rgb = to_uint8_rgb(mask[..., :3], name)
    if _is_grey(rgb):
        return np.asarray(Image.fromarray(rgb).convert("L"))
    return _shades(rgb, name)


def _shares(array: np.ndarray, name: str) -> np.ndarray:
    """Values in [0, 1] from whatever range they are in."""
    if array.dtype == bool:
        return array.astype(np.float32)
    low, high = array.min(), array.max()
    slack = 1e-3 if array.dtype.kind == "f" else 0  # what resizing may overshoot
    if low < -slack or high > 65535:
        raise ValueError(
            f"{name} has values from {low:g} to {high:g}; a mask is 0 (kept) to 1 or 255."
        )
    if high <= 1 + slack:
        return np.clip(array, 0, 1).astype(np.float32)
    shares = np.clip(array, 0, None) / (255 if high <= 255 else 65535)
    shares = np.where(shares < NOISE, 0, np.where(shares > 1 - NOISE, 1, shares))
    return shares.astype(np.float32)


def _is_grey(rgb: np.ndarray) -> bool:
    """Whether an image uint8 (h, w, 3) has no colour."""
    return np.ptp(rgb.astype(np.int16), axis=2).max() <= GREY * rgb.max()


def _shades(rgb: np.ndarray, name: str) -> np.ndarray:
    """A mask of one colour on black: uint8 (h, w), 255 where it is the colour, 0 where it is black.

    Shades between them, as at the smooth edge of a brush, become shares.

    Args:
        rgb: uint8 (h, w, 3), not grey.

    Raises:
        ValueError: there are other colours; the message starts with `name`.
    """
    value = rgb.max(2).astype(np.float32)
    bright = value > value.max() / 2
    color = np.median(rgb[bright], axis=0)
    level = np.median(value[bright])
    distance = np.abs(rgb - value[..., None] * (color / level)).max(2)
    other = distance > SAME * level
    if other.any():
        sides = (~bright & ~other, bright & ~other)
        edge = np.logical_and.reduce([_near(side) for side in sides])
        if (other & ~edge).any():
            raise ValueError(
                f"{name} has several colours: give a mask in black (kept) and white (repainted), "
                "or in black and one other colour, which counts as white."
            )
    return np.rint(255 * np.clip(value / level, 0, 1)).astype(np.uint8)


def _near(region: np.ndarray) -> np.ndarray:
    if not region.any():
        return region
    return ndimage.distance_transform_cdt(~region, "chessboard") <= BLUR
