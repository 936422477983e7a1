# SPDX-License-Identifier: Apache-2.0
"""Masks for inpainting: polarity, kinds, shares, determinism."""

import numpy as np
import pytest

from k3jax.training.config import MaskConfig
from k3jax.training.masks import MIN_SHARE, draw_mask, draw_masks


BOXES = MaskConfig(boxes=1, strokes=0, whole=0)
STROKES = MaskConfig(boxes=0, strokes=1, whole=0)
WHOLE = MaskConfig(boxes=0, strokes=0, whole=1)


def test_one_is_known_and_zero_is_painted():
    """A whole-image mask leaves nothing known."""
    mask = draw_mask(np.random.default_rng(0), 24, 40, WHOLE)
    assert mask.shape == (24, 40) and mask.dtype == np.float32
    assert not mask.any()


@pytest.mark.parametrize("config", [BOXES, STROKES])
def test_part_of_the_image_is_painted(config):
    masks = draw_masks(np.random.default_rng(0), 200, 64, 96, config)
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
    for mask in draw_masks(np.random.default_rng(1), 50, 64, 64, BOXES):
        rows = {row.tobytes() for row in mask if not row.all()}
        found += len(rows) == 1
    assert found > 5


def test_shares_of_the_kinds():
    masks = draw_masks(np.random.default_rng(2), 600, 16, 16, MaskConfig(1, 1, 2))
    whole = 1 - masks.any((1, 2)).mean()
    assert abs(whole - 0.5) < 0.07


def test_masks_are_a_function_of_the_generator():
    first, again, other = (draw_masks(np.random.default_rng(s), 5, 32, 32) for s in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_tiny_images():
    masks = draw_masks(np.random.default_rng(0), 50, 2, 3, MaskConfig(1, 1, 0))
    assert (masks.mean((1, 2)) < 1).all()


@pytest.mark.parametrize("config", [MaskConfig(0, 0, 0), MaskConfig(-1, 1, 1)])
def test_shares_without_sense_are_refused(config):
    with pytest.raises(ValueError, match="must be 0 or more, and one of them more than 0"):
        draw_mask(np.random.default_rng(0), 8, 8, config)
