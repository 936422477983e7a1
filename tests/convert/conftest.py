# SPDX-License-Identifier: Apache-2.0
"""Tiny PyTorch checkpoints that several tests convert."""

import shutil

import pytest
import torch

from k3jax.convert.from_torch import convert

from conversions import quiet
from torch_checkpoints import write_diffusers, write_original


@pytest.fixture(scope="session")
def diffusers(tmp_path_factory):
    """A diffusers checkpoint in shards."""
    folder = tmp_path_factory.mktemp("diffusers")
    write_diffusers(folder, shards=3)
    return folder


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    """All three variants of 3.1 in one folder, as published."""
    folder = tmp_path_factory.mktemp("original")
    for variant in ("base", "flash", "inpainting"):
        write_original(folder, variant=variant)
    return folder


@pytest.fixture
def copy(diffusers, tmp_path):
    """A copy of the diffusers checkpoint, to be damaged."""
    return shutil.copytree(diffusers, tmp_path / "copy")


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """(source, checkpoint, state dicts) of a diffusers checkpoint, as fp16 with fp32 `wo`."""
    folder = tmp_path_factory.mktemp("diffusers")
    states = write_diffusers(
        folder / "src", torch.float16, variant="fp16", shards=3, float32_wo=True
    )
    quiet(convert, folder / "src", folder / "ours")
    return folder / "src", folder / "ours", states
