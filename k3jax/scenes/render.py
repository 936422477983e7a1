# SPDX-License-Identifier: Apache-2.0
"""Draws a scene. Edges are smooth because a pixel's share follows from its distance to the edge."""

import math

import numpy as np

from k3jax.scenes.scene import BACKGROUNDS, CANVAS, COLORS, DARK, Scene, SceneObject


ARM = 0.36  # half the width of a cross's arms
HOLE = 0.55  # inner radius of a ring
NOTCH = 0.45  # radius of a star's inner corners, its tips being at 1
STRIPE = 9.0  # pixels of a light and a dark stripe together, on a canvas of 128
DOT_STEP, DOT_ROW, DOT_RADIUS = 7.0, 5.5, 2.0


def render(scene: Scene, size: int | None = None) -> np.ndarray:
    """The picture, uint8 (size, size, 3); without `size` as large as the scene says."""
    size = size or scene.size
    image = np.empty((size, size, 3), np.float32)
    image[:] = BACKGROUNDS[scene.background]
    for item in scene.objects:
        box, x, y, radius = _window(item, size, size / scene.size)
        inside = np.clip(0.5 - radius * distance(item.shape, x / radius, y / radius), 0, 1)
        color = np.array(COLORS[item.color], np.float32)
        if item.texture != "plain":
            dark = np.clip(0.5 - _texture(item.texture, x, y, size / CANVAS), 0, 1)
            color = color * (1 - (1 - DARK) * dark[..., None])
        image[box] += inside[..., None] * (color - image[box])
    return np.rint(image).astype(np.uint8)


def mask_of(scene: Scene, index: int, size: int | None = None) -> np.ndarray:
    """The pixels that object `index` covers by half or more, bool (size, size)."""
    size = size or scene.size
    box, x, y, radius = _window(scene.objects[index], size, size / scene.size)
    mask = np.zeros((size, size), bool)
    mask[box] = distance(scene.objects[index].shape, x / radius, y / radius) <= 0
    return mask


def distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """About how far points are outside a shape that fills the box -1..1; negative inside.

    `x` (1, w) and `y` (h, 1) broadcast to the result (h, w), in the unit of the box.
    """
    if shape == "circle":
        return np.sqrt(x * x + y * y) - 1
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 1
    if shape == "triangle":
        slope = (2 * np.abs(x) - y - 1) / math.sqrt(5)
        return np.maximum(slope, y - 1)
    if shape == "cross":
        x, y = np.abs(x), np.abs(y)
        upright = np.maximum(x - ARM, y - 1)
        return np.minimum(upright, np.maximum(x - 1, y - ARM))
    if shape == "ring":
        middle = (1 + HOLE) / 2
        return np.abs(np.sqrt(x * x + y * y) - middle) - (1 - HOLE) / 2
    if shape == "star":
        return _star(x, y)
    raise ValueError(f"{shape!r} is no shape.")


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five tips, one up, stretched a little so that they touch the box on all sides."""
    width, top, bottom = math.sin(math.tau / 5), 1.0, math.cos(math.pi / 5)
    x, y = x * width, y * (top + bottom) / 2 - (top - bottom) / 2
    # Folded onto half a tip, the edge is one straight line from the tip to the inner corner.
    angle = np.abs((np.arctan2(x, -y) + math.pi / 5) % (math.tau / 5) - math.pi / 5)
    radius = np.sqrt(x * x + y * y)
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    corner_x, corner_y = NOTCH * math.cos(math.pi / 5), NOTCH * math.sin(math.pi / 5)
    length = math.hypot(1 - corner_x, corner_y)
    return ((along - 1) * corner_y + across * (1 - corner_x)) / length


def _texture(texture: str, x: np.ndarray, y: np.ndarray, scale: float) -> np.ndarray:
    """Pixels outside the dark parts of a texture that is centred on its object."""
    if texture == "striped":
        return np.abs(_wrap(x, STRIPE * scale)) - STRIPE * scale / 4 + 0 * y
    # Every other row of dots is shifted by half a step: no column of pixels is like a stripe.
    row = np.round(y / (DOT_ROW * scale))
    x = _wrap(x + row % 2 * DOT_STEP * scale / 2, DOT_STEP * scale)
    return np.sqrt(x * x + (y - row * DOT_ROW * scale) ** 2) - DOT_RADIUS * scale


def _wrap(x: np.ndarray, period: float) -> np.ndarray:
    return (x + period / 2) % period - period / 2


def _window(item: SceneObject, size: int, scale: float):
    """The slices around an object and its pixels' offsets from its centre."""
    center, radius = [c * scale for c in item.center], item.radius * scale
    ranges = [(max(0, int(c - radius) - 1), min(size, int(c + radius) + 2)) for c in center]
    x, y = (np.arange(*r, dtype=np.float32) + 0.5 - c for r, c in zip(ranges, center, strict=True))
    box = (slice(*ranges[1]), slice(*ranges[0]))
    return box, x[None], y[:, None], np.float32(radius)
