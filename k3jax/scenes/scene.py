# SPDX-License-Identifier: Apache-2.0
"""Random scenes of one to four coloured shapes, and the looks that no training scene has.

Lengths are given for a canvas of 128 pixels and scale with it. x grows to the right, y downwards.
"""

import functools
import hashlib
from dataclasses import dataclass

import numpy as np


COLORS = {
    "red": (225, 35, 35),
    "green": (40, 170, 60),
    "blue": (60, 120, 255),
    "yellow": (250, 225, 40),
    "orange": (250, 125, 10),
    "purple": (150, 50, 200),
    "pink": (255, 105, 180),
    "cyan": (40, 215, 225),
}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (140, 140, 140),
    "beige": (235, 215, 180),
    "navy": (16, 22, 78),
}
DARK = 0.55
"""The second tone of a texture is the colour times this."""

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
TEXTURES = {"plain": 0.6, "striped": 0.2, "dotted": 0.2}
SIZES = {"small": (11.0, 14.0), None: (17.0, 22.0), "large": (27.0, 34.0)}
KINDS = {"single": 0.30, "count": 0.15, "pair": 0.20, "relation": 0.35}
MIXES = {
    "all": (KINDS, 0.5),
    "places": ({"single": 0.4, "relation": 0.6}, 1.0),
    "pairs": ({"single": 0.15, "count": 0.1, "pair": 0.35, "relation": 0.4}, 0.5),
    "several": ({"single": 0.15, "count": 0.2, "pair": 0.25, "relation": 0.4}, 0.5),
}
"""Shares of the kinds, and of the single objects whose caption says where they are."""
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""The direction from the second object to the first."""

POSITIONS = {
    "in the top left corner": (0, 0),
    "at the top": (1, 0),
    "in the top right corner": (2, 0),
    "on the left": (0, 1),
    "in the center": (1, 1),
    "on the right": (2, 1),
    "in the bottom left corner": (0, 2),
    "at the bottom": (1, 2),
    "in the bottom right corner": (2, 2),
}
"""Column and row of the object's centre, in thirds of the canvas."""

CANVAS, MARGIN, GAP = 128, 3.0, 4.0
ALONG, ACROSS = 34.0, 16.0  # least distance along the axis of a relation, most across it
SPLITS = {"train": 0, "test": 1}
CANDIDATES = 64
HELD_OUT_SHARE = 0.15
SALT = "k3jax scenes 112"  # leaves every colour 4 of 6 shapes or more in each texture


@dataclass(frozen=True)
class SceneObject:
    """An upright shape. `radius` is half the side of its bounding box, `center` that box's."""

    shape: str
    color: str
    texture: str
    size_name: str | None
    center: tuple[float, float]
    radius: float


@dataclass(frozen=True)
class Scene:
    """The objects of a picture of `size` x `size` pixels, and what its caption mentions."""

    objects: tuple[SceneObject, ...]
    background: str
    kind: str
    relation: str | None
    position: str | None
    count: int
    named_background: bool
    size: int = CANVAS


@functools.cache
def held_out(triple: tuple[str, str, str]) -> bool:
    """Whether no training scene has an object of this (texture, colour, shape)."""
    return _hash(triple) < HELD_OUT_SHARE


@functools.cache
def held_out_pair(color1: str, shape1: str, relation: str, color2: str, shape2: str) -> bool:
    """Whether no training scene has these two objects in this relation; "and": none is named.

    The same picture described from the other object is the same combination: left of and right of
    are one, above and below too, and "and" has no order.
    """
    first, second = (color1, shape1), (color2, shape2)
    if relation in ("right of", "below"):
        relation = {"right of": "left of", "below": "above"}[relation]
        first, second = second, first
    elif relation == "and":
        first, second = sorted((first, second))
    return _hash((*first, relation, *second)) < HELD_OUT_SHARE


def unseen(scene: Scene) -> bool:
    """Whether anything in a scene is held out."""
    looks = [(o.texture, o.color, o.shape) for o in scene.objects]
    return _unseen(looks, scene.kind, scene.relation)


def sample_scene(
    rng: np.random.Generator, split: str = "train", size: int = CANVAS, mix: str = "all"
) -> Scene:
    """A random scene: of "train" nothing in it is held out, of "test" something is.

    Args:
        mix: "places": only scenes whose caption says where something is; "pairs": mostly two
            objects; "several": mostly two to four; see MIXES.
    """
    is_test = SPLITS[split] == 1
    # The kind is drawn before anything is rejected, so both splits have the same kinds.
    kinds, placed = MIXES[mix]
    kind = _draw(rng, kinds)
    relation = list(RELATIONS)[rng.integers(len(RELATIONS))] if kind == "relation" else None
    two = kind in ("pair", "relation")
    count = int(rng.integers(2, 5)) if kind == "count" else 2 if two else 1
    while True:
        looks = [_look(rng) for _ in range(2 if two else 1)]
        alike = two and (looks[0][1] == looks[1][1] or looks[0][2] == looks[1][2])
        if not alike and _unseen(looks, kind, relation) == is_test:
            break
    names = ("small", None, "large") if kind == "single" else ("small", None)
    size_names = [names[rng.integers(len(names))] for _ in looks]
    radii = [float(rng.uniform(*SIZES[name])) for name in size_names]
    if kind == "count":
        looks, size_names = looks * count, size_names * count
        # Four objects of the largest medium size would hardly ever fit at random.
        radii = [min(radii[0], 19.0 if count == 4 else 22.0)] * count
    position = None
    if kind == "single" and rng.random() < placed:
        position = list(POSITIONS)[rng.integers(len(POSITIONS))]
    named_background = bool(rng.random() < 0.6)
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))] if named_background else "white"
    scale = size / CANVAS
    objects = tuple(
        SceneObject(shape, color, texture, name, (float(x) * scale, float(y) * scale), r * scale)
        for (texture, color, shape), name, (x, y), r in zip(
            looks, size_names, _places(rng, np.array(radii), relation, position), radii, strict=True
        )
    )
    return Scene(objects, background, kind, relation, position, count, named_background, size)


def scene_at(
    seed: int, index: int, split: str = "train", size: int = CANVAS, mix: str = "all"
) -> Scene:
    """Scene number `index` of a split: always the same one."""
    return sample_scene(np.random.default_rng([seed, index, SPLITS[split]]), split, size, mix)


def _places(rng, radii: np.ndarray, relation: str | None, position: str | None) -> np.ndarray:
    """Centres (objects, 2) in pixels of the canvas, uniform among those that are allowed."""
    low, high = np.tile((radii + MARGIN)[:, None], 2), CANVAS - (radii + MARGIN)[:, None]
    if position is not None:
        third = np.array(POSITIONS[position]) * CANVAS / 3
        low, high = np.maximum(low, third), np.minimum(high, third + CANVAS / 3)
    while True:
        centers = rng.uniform(low, high, (CANDIDATES, len(radii), 2))
        allowed = np.ones(CANDIDATES, bool)
        for i in range(len(radii)):
            for j in range(i):
                apart = np.abs(centers[:, i] - centers[:, j]).max(-1)
                allowed &= apart >= radii[i] + radii[j] + GAP
        if relation is not None:
            direction = np.array(RELATIONS[relation])
            offset = centers[:, 0] - centers[:, 1]
            allowed &= offset @ direction >= ALONG
            allowed &= np.abs(offset @ direction[::-1]) <= ACROSS
        if allowed.any():
            return centers[allowed.argmax()]


def _look(rng) -> tuple[str, str, str]:
    colors = list(COLORS)
    color, shape = colors[rng.integers(len(colors))], SHAPES[rng.integers(len(SHAPES))]
    return _draw(rng, TEXTURES), color, shape


def _draw(rng, shares: dict[str, float]) -> str:
    left = rng.random()
    for name, share in shares.items():
        left -= share
        if left < 0:
            return name
    return name


def _unseen(looks, kind: str, relation: str | None) -> bool:
    if any(held_out(look) for look in looks):
        return True
    if kind not in ("pair", "relation"):
        return False
    (_, *first), (_, *second) = looks
    return held_out_pair(*first, relation or "and", *second)


def _hash(words) -> float:
    """A number in 0..1 that is the same on every machine and in every process."""
    digest = hashlib.sha256("|".join((SALT, *words)).encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64
