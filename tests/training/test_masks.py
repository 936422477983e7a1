# SPDX-License-Identifier: Apache-2.0
"""Masks for inpainting: polarity, kinds, shares, determinism."""

import numpy as np
import pytest

from k3jax.scenes.caption import captioned
from k3jax.training.data.inpainting_masks import (
    MIN_SHARE,
    OBJECT_MARGIN,
    check_masks,
    draw_mask,
    draw_masks,
)
from k3jax.training.train_config import DataConfig, MaskConfig


BOXES = MaskConfig(boxes=1, strokes=0, whole=0)
STROKES = MaskConfig(boxes=0, strokes=1, whole=0)
WHOLE = MaskConfig(boxes=0, strokes=0, whole=1)
OBJECTS = MaskConfig(boxes=0, strokes=0, whole=0, objects=1)


def blank(count: int, height: int, width: int) -> np.ndarray:
    """Pictures with nothing in them."""
    return np.full((count, height, width, 3), 128, np.uint8)


def test_one_is_known_and_zero_is_painted():
    """A whole-image mask leaves nothing known."""
    mask = draw_mask(np.random.default_rng(0), 24, 40, WHOLE)
    assert mask.shape == (24, 40) and mask.dtype == np.float32
    assert not mask.any()


@pytest.mark.parametrize("config", [BOXES, STROKES])
def test_part_of_the_image_is_painted(config):
    masks = draw_masks(blank(200, 64, 96), np.random.default_rng(0), config)
    assert masks.shape == (200, 64, 96) and set(np.unique(masks)) == {0.0, 1.0}
    painted = 1 - masks.mean((1, 2))
    assert painted.min() >= MIN_SHARE and painted.max() <= 1
    assert painted.min() < 0.1 and painted.max() > 0.5 and 0.1 < painted.mean() < 0.6
    # No part of the image is spared, and the masks differ.
    assert (1 - masks.mean(0)).min() > 0.02
    assert len({mask.tobytes() for mask in masks}) == 200


def test_boxes_are_boxes():
    """Of a single box every row that is painted is painted at the same columns."""
    found = 0
    for mask in draw_masks(blank(50, 64, 64), np.random.default_rng(1), BOXES):
        rows = {row.tobytes() for row in mask if not row.all()}
        found += len(rows) == 1
    assert found > 5


def test_shares_of_the_kinds():
    masks = draw_masks(blank(600, 16, 16), np.random.default_rng(2), MaskConfig(1, 1, 2))
    whole = 1 - masks.any((1, 2)).mean()
    assert abs(whole - 0.5) < 0.07


def test_masks_are_a_function_of_the_generator():
    first, again, other = (
        draw_masks(blank(5, 32, 32), np.random.default_rng(s)) for s in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_tiny_images():
    masks = draw_masks(blank(50, 2, 3), np.random.default_rng(0), MaskConfig(1, 1, 0))
    assert (masks.mean((1, 2)) < 1).all()


@pytest.mark.parametrize("config", [MaskConfig(0, 0, 0), MaskConfig(-1, 1, 1)])
def test_shares_without_sense_are_refused(config):
    with pytest.raises(ValueError, match="must be 0 or more, and one of them more than 0"):
        draw_mask(np.random.default_rng(0), 8, 8, config)


def test_objects_are_covered_whole():
    """Each mask is one box around one object of the scene, with a margin; all get their turn."""
    image, _, scene = next(
        found
        for index in range(50)
        if (found := captioned(5, index))[2].kind == "count" and found[2].count == 3
    )
    masks = draw_masks(np.repeat(image[None], 40, 0), np.random.default_rng(0), OBJECTS)
    most = OBJECT_MARGIN[1] * len(image) + 3  # the checker is right to some 2 pixels
    covered = set()
    for mask in masks:
        rows, columns = np.nonzero(1 - mask)
        low, high = (np.array([f(columns), f(rows)]) for f in (np.min, np.max))
        box = mask[low[1] : high[1] + 1, low[0] : high[0] + 1]
        assert not box.any() and (1 - mask).mean() >= MIN_SHARE
        inside = [
            number
            for number, item in enumerate(scene.objects)
            if (low <= np.subtract(item.center, item.radius) + 3).all()
            and (high >= np.add(item.center, item.radius) - 3).all()
        ]
        item = scene.objects[inside[0]]
        assert (np.subtract(item.center, item.radius) - low <= most).all()
        assert (high - np.add(item.center, item.radius) <= most).all()
        covered.add(inside[0])
    assert covered == {0, 1, 2}
    assert len({mask.tobytes() for mask in masks}) > 30


def test_where_there_is_no_object_a_box_is_drawn():
    masks = draw_masks(blank(20, 128, 128), np.random.default_rng(0), OBJECTS)
    assert (masks.mean((1, 2)) <= 1 - MIN_SHARE).all()


def test_small_objects_get_a_wider_margin():
    mask = draw_mask(np.random.default_rng(0), 64, 96, OBJECTS, lambda: [(0, 0, 2, 2)])
    assert MIN_SHARE <= (1 - mask).mean() < 2 * MIN_SHARE and not mask[:3, :3].any()


def test_objects_are_found_in_scenes_alone():
    check_masks(OBJECTS, DataConfig(kind="scenes"))
    with pytest.raises(ValueError, match=r"train.masks.objects is .*data.kind is 'folder'"):
        check_masks(OBJECTS, DataConfig(kind="folder"))
