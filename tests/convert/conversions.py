# SPDX-License-Identifier: Apache-2.0
"""What the tests of conversion do again and again."""

import pathlib

import pytest
import torch
from safetensors.torch import load_file

from k3jax.convert.from_torch import convert
from k3jax.convert.rules import ConversionError


def quiet(function, *args, **kwargs):
    return function(*args, progress=False, **kwargs)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def load(folder: pathlib.Path, pattern: str) -> dict[str, torch.Tensor]:
    """All tensors of the files that match."""
    tensors = {}
    for file in sorted(folder.glob(pattern)):
        is_safetensors = file.suffix == ".safetensors"
        tensors |= load_file(file) if is_safetensors else torch.load(file, weights_only=True)
    return tensors


def refused(folder, tmp_path, **kwargs) -> str:
    """The one-line message with which a conversion is refused; nothing may be left behind."""
    with pytest.raises(ConversionError) as caught:
        convert(folder, tmp_path / "out", progress=False, **kwargs)
    assert [p for p in tmp_path.iterdir() if p.name.startswith("out")] == []
    return str(caught.value)
