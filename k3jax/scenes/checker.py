# SPDX-License-Identifier: Apache-2.0
"""Recognises the objects of a picture from its pixels, and compares them with a scene.

For the output of a small diffusion model: soft edges, some noise, slightly wrong colours. All
measurements are at 128 pixels; pictures of another size are resized first.
"""

import functools
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields, replace

import numpy as np
from PIL import Image
from scipy import ndimage

from k3jax.scenes.render import distance
from k3jax.scenes.scene import (
    BACKGROUNDS,
    CANVAS,
    COLORS,
    DARK,
    POSITIONS,
    RELATIONS,
    SHAPES,
    Scene,
)


FOREGROUND = 45.0  # RGB distance from the background; half of that of the closest dark tone
SPECK = 60  # pixels; the smallest star has some 170
SEED = 20  # pixels of one colour in one place, below which it is an edge's mixture
PINHOLE = 20  # pixels; the hole of the smallest ring has some 110
LEAST_ACROSS = 50.0  # RGB distance at which a background's hue is unlike a colour's
LEAST_IOU = 0.6  # below it a thing is of no shape
MOST_ASPECT = 1.5
SMALL, LARGE = 15.5, 24.5  # half sides; midway between the sizes that scenes have
TONE = 0.8  # of a colour, below which a pixel is dark
DARK_SHARE = (0.1, 0.85)  # of an object with a texture
STRIPED = 0.45  # share of the variance of dark and light that lies between columns
SLACK = 4.0  # pixels that a centre may be outside of its third of the canvas


@dataclass(frozen=True)
class Found:
    """An object of a picture; lengths in its pixels.

    `shape` is None where none fits. `extents` are half the sides of the bounding box.
    """

    shape: str | None
    color: str
    texture: str
    size_name: str | None
    center: tuple[float, float]
    extents: tuple[float, float]
    area: float


@dataclass(frozen=True)
class Reading:
    """Everything recognised in a picture of `size` pixels; `objects` are largest first."""

    objects: tuple[Found, ...]
    background: str
    size: int


@dataclass(frozen=True)
class Verdict:
    """Which parts of a caption are right in a picture; None: the caption does not mention it.

    Attributes:
        color_on_shape: every named shape exists in its colour; of a count, at least one.
        objects: of captions with two objects, both exist.
        relation: the first is in the named direction of the second, farther than sideways.
        count: as many objects of the named colour and shape as the caption says.
        background: the named one.
        position: the centre is in the named third of the canvas, within SLACK.
        size, texture: every object with a named size or texture exists and has it.

    A missing object is wrong in everything. Objects that the caption does not name are allowed. Of
    several with the same colour and shape the largest counts, or of a count all.
    """

    color_on_shape: bool
    objects: bool | None
    relation: bool | None
    count: bool | None
    background: bool | None
    position: bool | None
    size: bool | None
    texture: bool | None


def read(image: np.ndarray) -> Reading:
    """Recognises a picture (size, size, 3), uint8 or float in 0..1."""
    found, background = _read(_pixels(image))
    objects = tuple(_scaled(item, len(image) / CANVAS) for item in found)
    return Reading(objects, background, len(image))


def find_objects(image: np.ndarray) -> list[Found]:
    """The objects of a picture, largest first; image as for `read`."""
    return list(read(image).objects)


def check(scene: Scene, image: np.ndarray) -> Verdict:
    """Judges a picture by the caption of a scene; image as for `read`."""
    return judge(scene, read(image))


def judge(scene: Scene, reading: Reading) -> Verdict:
    """Judges a reading by the caption of a scene, which may have another size."""
    named = scene.objects[:1] if scene.kind == "count" else scene.objects
    looks = [(item.color, item.shape) for item in named]
    matches = [[f for f in reading.objects if (f.color, f.shape) == look] for look in looks]
    complete = all(matches)
    relation = position = None
    if scene.relation is not None:
        relation = complete and _related(scene.relation, matches[0][0], matches[1][0])
    if scene.position is not None:
        position = complete and _placed(scene.position, matches[0][0], reading.size)
    return Verdict(
        color_on_shape=complete,
        objects=complete if len(named) == 2 else None,
        relation=relation,
        count=len(matches[0]) == scene.count if scene.kind == "count" else None,
        background=reading.background == scene.background if scene.named_background else None,
        position=position,
        size=_all_have("size_name", named, matches, scene.kind),
        texture=_all_have("texture", named, matches, scene.kind),
    )


def summary(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """Name -> share of right verdicts among those that are not None, if there are any."""
    shares, rows = {}, [astuple(verdict) for verdict in verdicts]
    for number, field in enumerate(fields(Verdict)):
        answers = [row[number] for row in rows if row[number] is not None]
        if answers:
            shares[field.name] = sum(answers) / len(answers)
    return shares


def _scaled(item: Found, scale: float) -> Found:
    center, extents = (tuple(x * scale for x in xs) for xs in (item.center, item.extents))
    return replace(item, center=center, extents=extents, area=item.area * scale**2)


def _pixels(image: np.ndarray) -> np.ndarray:
    """float32 (CANVAS, CANVAS, 3) in 0..255."""
    if image.dtype != np.uint8:
        image = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    if image.shape[:2] != (CANVAS, CANVAS):
        image = Image.fromarray(image).resize((CANVAS, CANVAS), Image.Resampling.BILINEAR)
    return np.asarray(image, np.float32)


def _background(pixels: np.ndarray) -> tuple[str, np.ndarray]:
    """The background that is nearest to most pixels, and its RGB in this picture."""
    pixels = pixels[::2, ::2].reshape(-1, 3)
    palette = np.array(list(BACKGROUNDS.values()), np.float32)
    distances = _distances(pixels, palette)
    nearest = distances.argmin(1)
    nearest[_tone_distances(pixels).min(1) < distances.min(1)] = len(palette)
    counts = np.bincount(nearest, minlength=len(palette))[: len(palette)]
    best = int(counts.argmax())
    color = np.median(pixels[nearest == best], axis=0) if counts[best] else palette[best]
    return list(BACKGROUNDS)[best], color


def _tone_distances(pixels: np.ndarray) -> np.ndarray:
    """Squared distance (n, 8) of each pixel (n, 3) to each colour in all tones, light to dark."""
    colors = np.array(list(COLORS.values()), np.float32)
    return _distances(pixels, colors, np.clip(pixels @ colors.T / (colors**2).sum(1), DARK, 1))


def _distances(pixels: np.ndarray, colors: np.ndarray, tones=1) -> np.ndarray:
    """|pixel - tone * color|^2, multiplied out."""
    lengths = (colors**2).sum(1) * tones**2
    return (pixels**2).sum(1, keepdims=True) - 2 * tones * (pixels @ colors.T) + lengths


def _read(pixels: np.ndarray) -> tuple[list[Found], str]:
    """The objects, largest first, with lengths at 128 pixels, and the name of the background."""
    name, background = _background(pixels)
    offset = pixels - background
    foreground = np.einsum("hwc,hwc->hw", offset, offset) > FOREGROUND**2
    labels = np.full(foreground.shape, -1)
    labels[foreground] = _tone_distances(pixels[foreground]).argmin(1)

    # Edges mix a colour with the background, which can come nearest to a third colour. So only
    # places of one colour that are 3 pixels wide count, and all else takes the nearest place's.
    seeds = np.full(labels.shape, -1)
    for number in np.unique(labels[foreground]):
        places = ndimage.binary_opening(labels == number, np.ones((3, 3)))
        seeds[_keep(places, SEED)] = number
    if (seeds < 0).all():
        return [], name
    nearest = ndimage.distance_transform_edt(seeds < 0, return_distances=False, return_indices=True)
    labels = np.where(foreground, seeds[tuple(nearest)], -1)

    found = []
    for number in np.unique(labels[foreground]):
        covered = _covered(pixels, background, list(COLORS.values())[number])
        components, count = ndimage.label((labels == number) & covered)
        for i, box in enumerate(ndimage.find_objects(components, count), 1):
            mask = components[box] == i
            if mask.sum() >= SPECK:
                holes = ndimage.binary_fill_holes(mask) & ~mask
                mask |= holes & ~_keep(holes, PINHOLE)
                found.append(_describe(mask, pixels[box], box, list(COLORS)[number], background))
    return sorted(found, key=lambda f: -f.area), name


def _covered(pixels: np.ndarray, background: np.ndarray, color) -> np.ndarray:
    """Whether an object of this colour, in whatever tone, makes up half or more of each pixel.

    What is perpendicular to the colour comes from the background alone, and its share falls to
    none as the object's grows. A background of nearly the same hue has no such part, or black;
    there a pixel is covered that is lighter than half way to the dark tone.
    """
    color = np.array(color, np.float32)
    unit = color / np.sqrt(color @ color)
    across = background - background @ unit * unit
    if across @ across > LEAST_ACROSS**2:
        return pixels @ across < across @ across / 2
    return pixels @ unit > (background @ unit + DARK * color @ unit) / 2


def _keep(mask: np.ndarray, least: int) -> np.ndarray:
    """The components of at least so many pixels."""
    components, _ = ndimage.label(mask)
    large = np.bincount(components.ravel()) >= least
    large[0] = False
    return large[components]


def _describe(mask: np.ndarray, pixels: np.ndarray, box, color: str, background) -> Found:
    """Names one component: mask (h, w) and pixels (h, w, 3) of its bounding box."""
    (top, bottom), (left, right) = ((part.start, part.stop) for part in box)
    extents = ((right - left) / 2, (bottom - top) / 2)
    scores = [(mask & t).sum() / (mask | t).sum() for t in _templates(*mask.shape)]
    fits = max(scores) >= LEAST_IOU and max(extents) <= MOST_ASPECT * min(extents)
    shape = SHAPES[int(np.argmax(scores))] if fits else None
    center = ((left + right) / 2, (top + bottom) / 2)
    texture = _texture(mask, pixels, np.array(COLORS[color], np.float32), background)
    size_name = "small" if max(extents) < SMALL else "large" if max(extents) > LARGE else None
    return Found(shape, color, texture, size_name, center, extents, float(mask.sum()))


@functools.lru_cache(4096)
def _templates(height: int, width: int) -> list[np.ndarray]:
    """Each of SHAPES as a mask that fills the box."""
    x = ((np.arange(width) + 0.5) * 2 / width - 1)[None]
    y = ((np.arange(height) + 0.5) * 2 / height - 1)[:, None]
    return [distance(shape, x, y) <= 0 for shape in SHAPES]


def _texture(mask: np.ndarray, pixels: np.ndarray, color: np.ndarray, background) -> str:
    tone, under = pixels @ color / (color @ color), background @ color / (color @ color)
    # An edge that mixes with a dark background must not be taken for the dark tone: what is darker
    # than that (noise aside) is outside, and the pixels next to it do not count either.
    rim = 1.5 if under < TONE else 1
    solid = mask & (tone > DARK - 0.05) if under < DARK else mask
    depth = ndimage.distance_transform_edt(np.pad(solid, 1))[1:-1, 1:-1]
    inner = depth > (rim if (depth > rim).sum() >= SPECK / 3 else 1)
    dark = tone < TONE
    share = dark[inner].mean() if inner.any() else 0
    if not DARK_SHARE[0] <= share <= DARK_SHARE[1]:
        return "plain"
    # The variance of the columns' means; a stripe fills a column and a dot does not.
    rows = inner.sum(0)
    columns = (dark & inner).sum(0) / np.maximum(rows, 1)
    between = (rows * (columns - share) ** 2).sum() / rows.sum()
    return "striped" if between >= STRIPED * share * (1 - share) else "dotted"


def _related(relation: str, first: Found, second: Found) -> bool:
    direction = np.array(RELATIONS[relation])
    offset = np.subtract(first.center, second.center)
    return bool(offset @ direction > abs(offset @ direction[::-1]))


def _placed(position: str, item: Found, size: int) -> bool:
    middle = (np.array(POSITIONS[position]) + 0.5) / 3
    return bool((np.abs(np.array(item.center) / size - middle) <= 1 / 6 + SLACK / CANVAS).all())


def _all_have(attribute: str, named, matches, kind: str) -> bool | None:
    expected = [(getattr(item, attribute), m) for item, m in zip(named, matches, strict=True)]
    expected = [(value, m) for value, m in expected if value not in (None, "plain")]
    if not expected:
        return None
    some = slice(None) if kind == "count" else slice(1)
    return all(m and all(getattr(f, attribute) == value for f in m[some]) for value, m in expected)
