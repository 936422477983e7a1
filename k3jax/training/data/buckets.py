# SPDX-License-Identifier: Apache-2.0
"""Aspect-ratio buckets: a few sizes for images of every shape (as in NovelAI's SDXL training)."""

import itertools

import numpy as np


MAX_RATIO = 2.0
MULTIPLE = 64


def make_buckets(
    resolution: int, max_ratio: float = MAX_RATIO, multiple: int = MULTIPLE
) -> list[tuple[int, int]]:
    """Sizes (height, width) that cannot grow on either side, from tall to wide.

    Args:
        resolution: no bucket has a larger area than a square of this side, which is one of them.
        max_ratio: of the longer side to the shorter.
        multiple: of all sides; what the U-Net can halve.
    """
    check_resolution(resolution, multiple)
    if max_ratio < 1:
        raise ValueError(f"max_ratio is {max_ratio}; it must be 1 or more.")

    def fits(h: int, w: int) -> bool:
        return h * w <= resolution**2 and max(h, w) <= max_ratio * min(h, w)

    longest = int(resolution * max_ratio**0.5)
    sides = range(multiple, longest + 1, multiple)
    return sorted(
        (
            (h, w)
            for h, w in itertools.product(sides, sides)
            if fits(h, w) and not fits(h + multiple, w) and not fits(h, w + multiple)
        ),
        key=lambda size: (size[1] / size[0], size),
    )


def check_resolution(resolution: int, multiple: int = MULTIPLE) -> None:
    """Refuses a side that is no multiple of `multiple`."""
    if resolution < multiple or resolution % multiple:
        near = max(multiple, round(resolution / multiple) * multiple)
        raise ValueError(
            f"resolution is {resolution}; it must be a positive multiple of {multiple} "
            f"(the nearest is {near})."
        )


def assign(width, height, buckets: list[tuple[int, int]]) -> np.ndarray:
    """The bucket whose ratio is nearest, on a logarithmic scale; of equals the taller one.

    Args:
        width, height: pixels of one image, or arrays (n,).

    Returns:
        int32, () or (n,).
    """
    h, w = np.array(buckets, np.float64).T
    ratios = np.log(w / h)
    order = np.argsort(ratios, kind="stable").astype(np.int32)
    borders = (ratios[order][1:] + ratios[order][:-1]) / 2
    ratio = np.log(np.asarray(width, np.float64) / np.asarray(height, np.float64))
    return order[np.searchsorted(borders, ratio)]


def scale(width, height, size: tuple[int, int]) -> np.ndarray:
    """The factor by which images are resized to cover (height, width) `size`; above 1: enlarged."""
    return np.maximum(size[0] / np.asarray(height), size[1] / np.asarray(width))
