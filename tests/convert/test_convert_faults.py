# SPDX-License-Identifier: Apache-2.0
"""Damaged, dangerous and foreign PyTorch checkpoints are refused, and nothing is left behind."""

import gzip
import json
import os
import pickle
import shutil

import pytest
import torch

from k3jax.convert.from_torch import convert
from k3jax.convert.rules import ConversionError
from k3jax.convert.tensors import open_weights
from k3jax.files import LFS_POINTER

import torch_checkpoints
from conversions import refused
from torch_checkpoints import UNET, write_diffusers


def test_truncated_and_broken_safetensors(copy, tmp_path):
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-1000], whole[:4], whole[:100], b"\xff" * 100, b""):
        file.write_bytes(content)
        message = refused(copy, tmp_path)
        assert "truncated" in message and str(file) in message
    file.write_bytes(whole[:8] + b"#" + whole[9:])
    assert f"{file} is truncated or damaged" in refused(copy, tmp_path)
    file.write_bytes(whole.replace(b'"F32"', b'"F99"', 1))
    assert f"{file} is truncated or damaged" in refused(copy, tmp_path)


KINDS = [
    (LFS_POINTER + b"v1\noid sha256:4d\nsize 9\n", "git lfs pull"),
    (gzip.compress(b"{}"), "gunzip"),
    ('{"a": 1}'.encode("utf-16"), "UTF-16"),
    (b"<!DOCTYPE HTML><html>not found</html>", "web page"),
    (b"PK\x03\x04" + 40 * b"\0", "zip archive"),
]


@pytest.mark.parametrize("content, words", KINDS, ids=[words for _, words in KINDS])
@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_files_of_another_kind_are_named(copy, tmp_path, name, content, words):
    (copy / "unet" / name).write_bytes(content)
    message = refused(copy, tmp_path)
    assert str(copy / "unet" / name) in message and words in message and "\n" not in message


def test_weights_in_float8_are_named(original, tmp_path):
    tensor = torch.ones(2).to(torch.float8_e4m3fn)
    torch_checkpoints.save({"a": tensor}, tmp_path / "q.safetensors")
    with pytest.raises(ConversionError, match=r"q\.safetensors has weights in F8_E4M3 \(a\)"):
        open_weights([tmp_path / "q.safetensors"])
    projection = original / "flan_ul2_encoder" / "projection.pt"
    content = torch.load(projection, weights_only=True)
    torch.save({**content, "1.bias": content["1.bias"].to(torch.float8_e4m3fn)}, tmp_path / "p.pt")
    with pytest.raises(ConversionError, match=r"p\.pt has weights in float8_e4m3fn \(1\.bias\)"):
        open_weights([tmp_path / "p.pt"])


def test_broken_pickles_and_json(original, tmp_path):
    folder = shutil.copytree(original, tmp_path / "copy")
    for name in ("kandinsky3.pt", "flan_ul2_encoder/pytorch_model-00002-of-00002.bin"):
        file = folder / name
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        message = refused(folder, tmp_path)
        assert "truncated" in message and str(file) in message
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n")
        assert f"{file} is a git-lfs pointer instead of the file" in refused(folder, tmp_path)
        file.write_bytes(whole)
    (folder / "flan_ul2_encoder" / "config.json").write_text("{")
    assert "is not JSON" in refused(folder, tmp_path)


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_pickles_that_hold_code_are_refused_and_not_run(original, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(original, tmp_path / "copy")
    torch.save({"unet": {}, "null_embedding": Code()}, folder / "kandinsky3.pt")
    assert "holds more than tensors and is refused" in refused(folder, tmp_path)
    (folder / "kandinsky3.pt").write_bytes(pickle.dumps(Code()))
    assert "kandinsky3.pt" in refused(folder, tmp_path)
    assert not (tmp_path / "ran").exists()
    torch.save([torch.zeros(1)], folder / "kandinsky3.pt")
    assert "holds a list, not a state dict" in refused(folder, tmp_path)
    torch.save({"model": {}}, folder / "kandinsky3.pt")
    assert "has no 'unet' (it has model)" in refused(folder, tmp_path)
    torch.save({"unet": {}, "null_embedding": 3}, folder / "kandinsky3.pt")
    assert "null_embedding is a int" in refused(folder, tmp_path)


def test_faults_of_all_components_come_together(tmp_path):
    unet = torch_checkpoints.state_dicts()["unet"]
    write_diffusers(
        tmp_path / "bad",
        changes={
            "unet": {
                "conv_in.weight": unet["conv_in.weight"][:, :3].clone(),
                "conv_out.bias": None,
            },
            "movq": {"quant_conv.weight": None, "loss.weight": torch.zeros(2)},
            "text_encoder": {"encoder.final_layer_norm.weight": torch.zeros(32).to(torch.int8)},
        },
    )
    with pytest.raises(ConversionError) as caught:
        convert(tmp_path / "bad", tmp_path / "out", progress=False)
    message = str(caught.value)
    assert "5 faults" in message and message.count("\n") == 4 and "and 2 more" in message
    faults = "\n".join(map(str, caught.value.faults))
    for part in (
        "unet: conv_in.weight (conv_in.kernel) has shape (16, 3, 3, 3); the model has (16, 4",
        "unet: missing tensor conv_out.bias of shape (4)",
        "movq: missing tensor quant_conv.weight of shape (4, 4, 1, 1)",
        "movq: unknown tensor loss.weight of shape (2)",
        "text_encoder: encoder.final_layer_norm.weight has dtype int8",
    ):
        assert part in faults


def test_checkpoint_of_another_architecture(copy, tmp_path):
    file = copy / "unet" / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "block_out_channels": [32, 128]}))
    message = refused(copy, tmp_path)
    assert "down_blocks.1" in message and message.count("\n") == 4 and "more." in message
    file.write_text(json.dumps({**values, "encoder_hid_dim": 64}))
    assert "text_encoder.d_model is 32 but the text projection has 64" in refused(copy, tmp_path)


def test_nan_weights_are_all_named_and_nothing_is_left(tmp_path):
    unet = torch_checkpoints.state_dicts()["unet"]
    bad = {}
    for name in ("conv_in.bias", "down_blocks.1.resnets_in.0.resnet_blocks.1.projection.weight"):
        bad[name] = unet[name].clone()
        bad[name].view(-1)[-1] = torch.nan if name == "conv_in.bias" else torch.inf
    write_diffusers(tmp_path / "bad", changes={"unet": bad})
    message = refused(tmp_path / "bad", tmp_path)
    assert "2 faults" in message and all(name in message for name in bad)


def test_values_too_large_for_float16(tmp_path):
    large = torch.full((UNET.init_channels,), 1e6)
    write_diffusers(tmp_path / "large", changes={"unet": {"conv_in.bias": large}})
    message = refused(tmp_path / "large", tmp_path, param_dtype="float16")
    assert "conv_in.bias has values too large for float16" in message
    assert "must be one of" in refused(tmp_path / "large", tmp_path, param_dtype="int8")
