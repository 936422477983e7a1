# SPDX-License-Identifier: Apache-2.0
"""Masks to train inpainting with: boxes, brush strokes, the whole image, or an object's box.

A mask is float32 (h, w) in pixels with the polarity of the model's mask channel: **1 where the
image is known, 0 where it is painted**. (The original's inpainting pipeline takes the inverse.)
The original's training is published only as "random masks".
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from PIL import Image, ImageDraw

from k3jax.scenes.checker import find_objects
from k3jax.training.train_config import DataConfig, MaskConfig


Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels, all of them inside the box."""

MIN_SHARE = 0.05
"""Smallest share of the pixels that is painted."""

BOXES = (1, 4)  # how many, both included
BOX_SIDE = (0.15, 0.7)  # share of the image's side
STROKES = (1, 5)
STROKE_POINTS = (4, 12)
STROKE_WIDTH = (0.05, 0.25)  # share of the image's shorter side
STROKE_STEP = (0.08, 0.3)
STROKE_TURN = 1.2  # radians, standard deviation
OBJECT_MARGIN = (0.0, 0.1)  # share of the image's shorter side, on each side of the object


def check_masks(config: MaskConfig, data: DataConfig) -> None:
    """Checks the shares of the kinds, before any mask is drawn.

    Raises:
        ValueError: shares that are all zero, or objects in data other than scenes.
    """
    _shares(config)
    if config.objects and data.kind != "scenes":
        raise ValueError(
            f"train.masks.objects is {config.objects}, but the objects are known only in data of "
            f"kind 'scenes', and data.kind is {data.kind!r}: set it to 0."
        )


def draw_mask(
    rng: np.random.Generator,
    height: int,
    width: int,
    config: MaskConfig | None = None,
    object_boxes: Callable[[], Sequence[Box]] = tuple,
) -> np.ndarray:
    """One mask, float32 (height, width): 1 known, 0 painted.

    Between MIN_SHARE and all of the pixels are painted.

    Args:
        object_boxes: returns the boxes of an image's objects; called only for a mask of that kind.
            Without objects the mask is of boxes.

    Raises:
        ValueError: shares of the kinds that are negative or all zero.
    """
    kinds, shares = _shares(MaskConfig() if config is None else config)
    kind = kinds[rng.choice(len(kinds), p=shares)]
    if kind == "whole":
        return np.zeros((height, width), np.float32)
    if kind == "objects":
        found = object_boxes()
        if found:
            return _around(rng, found[rng.integers(len(found))], height, width)
        kind = "boxes"
    image = Image.new("L", (width, height), 1)
    draw, once, number = ImageDraw.Draw(image), *_SHAPES[kind]
    for _ in range(rng.integers(*number, endpoint=True)):
        once(rng, draw, height, width)
    while (mask := np.asarray(image, np.float32)).mean() > 1 - MIN_SHARE:
        once(rng, draw, height, width)
    return mask


def draw_masks(
    images: np.ndarray, rng: np.random.Generator, config: MaskConfig | None = None
) -> np.ndarray:
    """Masks for images uint8 (b, h, w, 3): float32 (b, h, w), 1 known, 0 painted."""
    size = images.shape[1:3]
    return np.stack(
        [draw_mask(rng, *size, config, partial(_object_boxes, image)) for image in images]
    )


def _shares(config: MaskConfig) -> tuple[list[str], np.ndarray]:
    shares = dataclasses.asdict(config)
    values = np.array(list(shares.values()), np.float64)
    if not np.isfinite(values).all() or (values < 0).any() or not values.sum() > 0:
        raise ValueError(
            f"the shares of inpainting masks are {shares}; they must be 0 or more, and one of "
            "them more than 0."
        )
    return list(shares), values / values.sum()


def _object_boxes(image: np.ndarray) -> list[Box]:
    """Boxes of the objects of a scene that its checker finds."""
    return [
        (*np.subtract(found.center, found.extents), *np.add(found.center, found.extents))
        for found in find_objects(image)
    ]


def _around(rng, box: Box, height: int, width: int) -> np.ndarray:
    """A mask of an object's box with another margin on each side."""
    margins = rng.uniform(*OBJECT_MARGIN, 4) * min(height, width)
    grown = np.array(box) + margins * (-1, -1, 1, 1)
    while True:
        left, top, right, bottom = np.rint(grown).astype(int)
        mask = np.ones((height, width), np.float32)
        mask[max(top, 0) : bottom + 1, max(left, 0) : right + 1] = 0
        if mask.mean() <= 1 - MIN_SHARE:
            return mask
        grown += (-1, -1, 1, 1)


def _box(rng, draw, height, width):
    """A box with its centre anywhere: borders and corners are covered as often as the rest."""
    size = np.maximum(rng.uniform(*BOX_SIDE, 2) * (width, height), 1)
    corner = rng.uniform(0, 1, 2) * (width, height) - size / 2
    draw.rectangle([*np.rint(corner), *np.rint(corner + size - 1)], fill=0)


def _stroke(rng, draw, height, width):
    """A random walk with a round brush, which turns back at the border."""
    short = min(height, width)
    brush = max(1, round(rng.uniform(*STROKE_WIDTH) * short))
    point, angle = rng.uniform(0, 1, 2) * (width, height), rng.uniform(0, 2 * np.pi)
    points = [point]
    for _ in range(rng.integers(*STROKE_POINTS, endpoint=True)):
        angle += rng.normal(0, STROKE_TURN)
        step = rng.uniform(*STROKE_STEP) * short * np.array([np.cos(angle), np.sin(angle)])
        inside = np.clip(point + step, 0, (width - 1, height - 1))
        if (inside != point + step).any():
            angle += np.pi
        point = inside
        points.append(point)
    draw.line([tuple(p) for p in points], fill=0, width=brush)
    for x, y in points:
        draw.ellipse([x - brush / 2, y - brush / 2, x + brush / 2, y + brush / 2], fill=0)


_SHAPES = {"boxes": (_box, BOXES), "strokes": (_stroke, STROKES)}
