# SPDX-License-Identifier: Apache-2.0
"""Masks that are drawn in a colour on black, as masks in grey."""

import numpy as np
from scipy import ndimage


GREY = 1 / 16
"""Most difference of a pixel's channels in an image without colour, as a share of the brightest."""

SAME = 1 / 5
"""Most distance of a pixel from a shade of the mask's colour, as a share of the brightest."""

BLUR = 8
"""Pixels beside an edge in which a JPEG mixes the colours of both sides."""


def is_grey(rgb: np.ndarray) -> bool:
    """Whether an image uint8 (h, w, 3) has no colour."""
    return np.ptp(rgb.astype(np.int16), axis=2).max() <= GREY * rgb.max()


def shades(rgb: np.ndarray, name: str) -> np.ndarray:
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
