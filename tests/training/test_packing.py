# SPDX-License-Identifier: Apache-2.0
"""Checkpoints packed to ship: small, whole, sharing what is the same, and telling no places."""

import dataclasses

import numpy as np

from k3jax.checkpoints.format import read_checkpoint
from k3jax.checkpoints.manifest import files_below, read_manifest
from k3jax.checkpoints.restore import iterate_leaves, verify
from k3jax.checkpoints.writer import CheckpointWriter
from k3jax.training.result import pack

from random_checkpoint import write_random_checkpoint
from training_models import MODEL, UNET


def variant(base, path, change=lambda array: array + 1):
    """The base with another U-Net; all else is shared."""
    with CheckpointWriter(path) as writer:
        writer.add_tokenizer(base.path / "tokenizer")
        for component in base.component_paths:
            if component != "unet":
                writer.share(component, base.path)
                continue
            for name, array in iterate_leaves(base, component):
                writer.write(component, {name: change(array)})
        writer.commit(base.config, {"layout": "test"}, "float32")
    return read_checkpoint(path)


def test_equal_components_are_shared_and_others_are_not(base, tmp_path):
    base = read_checkpoint(base)
    other = variant(base, tmp_path / "variant")
    pack(base, tmp_path / "packed" / "base")
    packed = read_checkpoint(tmp_path / "packed" / "base")
    pack(other, tmp_path / "packed" / "other", packed)
    # Moved together they stay whole: the reference is relative.
    (tmp_path / "packed").rename(tmp_path / "moved")
    packed = read_checkpoint(tmp_path / "moved" / "base")
    shares = read_checkpoint(tmp_path / "moved" / "other")
    for component, folder in shares.component_paths.items():
        home = shares if component == "unet" else packed
        assert folder.parent == home.path
        assert (
            read_manifest(shares.path)["components"][component]
            == read_manifest(home.path)["components"][component]
        )
    assert not verify(shares.path) and not verify(packed.path)
    for (name, array), (_, original) in zip(
        iterate_leaves(shares, "unet"), iterate_leaves(other, "unet"), strict=True
    ):
        assert array.dtype == np.float16, name
        np.testing.assert_array_equal(array, original.astype(np.float16))


def test_the_card_is_for_people_to_change(base, tmp_path):
    pack(read_checkpoint(base), tmp_path / "packed")
    with (tmp_path / "packed" / "README.md").open("a") as card:
        card.write("What people add.")
    assert not verify(tmp_path / "packed")


def test_no_place_is_told(base, tmp_path):
    pack(read_checkpoint(base), tmp_path / "packed")
    for file in files_below(read_checkpoint(tmp_path / "packed").path):
        assert str(tmp_path).encode() not in file.read_bytes(), file


def test_packed_is_compressed(tmp_path):
    """Other checkpoints hold the arrays as they are in memory."""
    wide = dataclasses.replace(UNET, init_channels=32, block_out_channels=(64,))
    write_random_checkpoint(tmp_path / "base", dataclasses.replace(MODEL, unet=wide))
    base = read_checkpoint(tmp_path / "base")
    constant = variant(base, tmp_path / "constant", lambda array: np.full_like(array, 0.1))
    pack(constant, tmp_path / "packed")
    sizes = [
        sum(file.stat().length for file in files_below(path / "unet"))
        for path in (constant.path, read_checkpoint(tmp_path / "packed").path)
    ]
    assert sizes[1] < sizes[0] / 4, sizes  # float16 alone is a half
