# SPDX-License-Identifier: Apache-2.0
"""What the tests of conversion do again and again."""

import json
import pathlib

import pytest
import torch
from safetensors.torch import load_file

from k3jax.convert.from_torch import convert
from k3jax.convert.rules import ConversionError


PUBLISHED = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/spiece.model",
    "tokenizer/tokenizer_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "movq/config.json",
    "movq/diffusion_pytorch_model.fp16.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors.index.fp16.json",
    *(f"text_encoder/model.fp16-0000{i}-of-00005.safetensors" for i in range(1, 6)),
]


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


def write_index(folder, component, rename=None):
    """The index of a model's shards, as diffusers and transformers write it; returns the file."""
    names, files = {}, sorted((folder / component).glob("*-of-*"))
    for number, file in enumerate(files):
        if rename is not None:
            file = file.rename(file.with_name(rename.format(number)))
        is_safetensors = file.suffix == ".safetensors"
        tensors = load_file(file) if is_safetensors else torch.load(file, weights_only=True)
        names |= dict.fromkeys(tensors, file.name)
    stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
    stem = "pytorch_model" if file.suffix == ".bin" and component == "text_encoder" else stem
    index = folder / component / f"{stem}{file.suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return index
