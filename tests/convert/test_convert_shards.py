# SPDX-License-Identifier: Apache-2.0
"""Shards, their indexes, and stray files beside them: the weights are those that are meant."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from k3jax.convert.layouts import find_layout
from k3jax.convert.rules import ConversionError
from k3jax.convert.sources import open_source

import torch_checkpoints
from conversions import PUBLISHED, refused, write_index
from torch_checkpoints import write_diffusers


def shard(folder, component, pickles=False):
    """Splits the weights of a component into three shards with an index."""
    (whole,) = (folder / component).glob("*.bin" if pickles else "*.safetensors")
    tensors = torch.load(whole, weights_only=True) if pickles else load_file(whole)
    whole.unlink()
    for number in range(3):
        part = {name: tensors[name] for name in list(tensors)[number::3]}
        file = whole.with_name(f"{whole.stem}-0000{number + 1}-of-00003{whole.suffix}")
        torch_checkpoints.save(part, file)
    write_index(folder, component)
    return whole, tensors


@pytest.mark.parametrize(
    "component, pickles", [("unet", False), ("movq", True), ("text_encoder", True)]
)
def test_a_stray_file_beside_shards_is_never_taken(tmp_path, component, pickles):
    """One of zeros beside three shards; the shards alone, and the file alone, are what they are."""
    write_diffusers(tmp_path / "src", pickles=pickles)
    whole, tensors = shard(tmp_path / "src", component, pickles)
    source = open_source(tmp_path / "src")
    name = next(iter(source.tensors[component]))
    np.testing.assert_array_equal(
        source.tensors[component][name].read(), tensors[name].float().numpy()
    )
    torch_checkpoints.save({n: torch.zeros_like(t) for n, t in tensors.items()}, whole)
    message = refused(tmp_path / "src", tmp_path)
    index = next((tmp_path / "src" / component).glob("*.index.json"))
    assert f"{component}/{whole.name}" in message and f"{component}/{index.name}" in message
    index.unlink()
    message = refused(tmp_path / "src", tmp_path)
    assert f"{component}/{whole.name}" in message and "-00001-of-00003" in message
    write_index(tmp_path / "src", component)
    for file in (tmp_path / "src" / component).glob("*-of-*"):
        file.unlink()
    read = open_source(tmp_path / "src").tensors[component][name].read()  # the index was left
    assert not read.any()


SHARDS = [f"unet/diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"
PLAIN = [name.replace(".fp16", "") for name in PUBLISHED]
SHARDED = [name for name in PLAIN if not name.endswith("model.safetensors") or "unet" not in name]


def index_of(*names):
    content = json.dumps({"weight_map": {str(i): name for i, name in enumerate(names)}})
    return lambda name: content if name == INDEX else '{"weight_map": {"a": "gone.safetensors"}}'


def test_an_index_decides_between_sets_of_shards():
    two = [name.replace("00003", "00002") for name in SHARDS[:2]]
    plain = [name.removeprefix("unet/") for name in SHARDS]
    names = [*SHARDED, *SHARDS, *two, INDEX]
    layout = find_layout(names, "it", read_bytes=index_of(*plain))
    assert layout.weights["unet"] == SHARDS
    names = [name for name in names if name != INDEX]
    with pytest.raises(ConversionError, match=r"unet/ holds weights in 2 and 3 shards and no"):
        find_layout(names, "it", read_bytes=index_of())
    twice = [*SHARDED, *SHARDS, SHARDS[1].replace("00002", "2")]
    with pytest.raises(ConversionError, match="holds the same weights twice, as unet/"):
        find_layout(twice, "it", read_bytes=index_of())


@pytest.mark.parametrize(
    "name",
    [
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
        "unet/diffusion_pytorch_model.fp16.safetensors.index.json",
        "unet/diffusion_pytorch_model.safetensors.fp16.index.json",
    ],
)
def test_the_index_of_a_variant_is_of_that_variant(name):
    """fp16 shards beside a plain file are no doubles."""
    fp16 = [shard.replace(".safetensors", ".fp16.safetensors") for shard in SHARDS]
    single = "unet/diffusion_pytorch_model.safetensors"
    names = [*SHARDED, *PUBLISHED, *fp16, name, single]
    names.remove("unet/diffusion_pytorch_model.fp16.safetensors")
    text = json.dumps({"weight_map": {str(i): n[len("unet/") :] for i, n in enumerate(fp16)}})
    read = {name: text}.__getitem__
    found = find_layout(names, "it", weights_variant="fp16", text_encoder=False, read_bytes=read)
    assert found.weights["unet"] == fp16
    assert find_layout(names, "it", text_encoder=False, read_bytes=read).weights["unet"] == [single]


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "index.json is damaged"),
        ("[]", "index.json is damaged"),
        ('{"weight_map": {}}', "index.json is damaged"),
        ('{"weight_map": {"a": 3}}', "index.json is damaged"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "index.json is damaged"),
        ('{"weight_map": {"a": "b.safetensors"}}', "lacks unet/b.safetensors, which"),
        (json.dumps({"weight_map": {"a": SHARDS[0][5:], "b": "c.bin"}}), "lacks unet/c.bin, which"),
    ],
)
def test_damaged_indexes_are_named(text, message):
    names = [*SHARDED, INDEX, *(SHARDS[:1] if "0000" in text else [])]
    with pytest.raises(ConversionError, match=message) as error:
        find_layout(names, "it", text_encoder=False, read_bytes=lambda name: text)
    assert INDEX in str(error.value)
