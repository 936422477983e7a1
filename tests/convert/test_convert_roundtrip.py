# SPDX-License-Identifier: Apache-2.0
"""PyTorch -> ours -> PyTorch: bit for bit, in every layout; and what interruptions leave behind."""

import os

import numpy as np
import pytest
import torch
from diffusers import Kandinsky3Pipeline

from k3jax.checkpoints.format import read_checkpoint
from k3jax.checkpoints.restore import leaf_shapes, restore
from k3jax.convert import from_torch, to_torch
from k3jax.convert.from_torch import convert
from k3jax.convert.rules import ConversionError
from k3jax.convert.to_torch import export

import torch_checkpoints
from conversions import assert_equal, load, quiet
from torch_checkpoints import ARCHITECTURE, UNET, write_diffusers, write_original, write_pipeline


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """(source, checkpoint, state dicts) of an original 3.1 checkpoint in bfloat16."""
    folder = tmp_path_factory.mktemp("original")
    states = write_original(folder / "src", torch.bfloat16)
    quiet(convert, folder / "src", folder / "ours", architecture=ARCHITECTURE)
    return folder / "src", folder / "ours", states


def test_diffusers_fp16_with_fp32_wo(converted, tmp_path, monkeypatch):
    _, ours, states = converted
    monkeypatch.setattr(to_torch, "SHARD_BYTES", 20_000)  # so that the encoder is sharded again
    quiet(export, ours, tmp_path / "back")
    for component, state in states.items():
        assert_equal(load(tmp_path / "back" / component, "*.safetensors"), state)
    encoder = tmp_path / "back" / "text_encoder"
    assert len(list(encoder.glob("model-*.safetensors"))) > 2
    pipe = Kandinsky3Pipeline.from_pretrained(tmp_path / "back", dtype=torch.float16)
    assert_equal(dict(pipe.unet.state_dict()), states["unet"])
    found = dict(pipe.text_encoder.state_dict())
    assert torch.equal(found.pop("encoder.embed_tokens.weight"), found["shared.weight"])
    assert_equal(found, states["text_encoder"])
    assert pipe.tokenizer("A cute corgi").input_ids[-1] == 1
    assert read_checkpoint(ours).dtype == "float16"


def test_what_save_pretrained_wrote_comes_back(tmp_path):
    """diffusers' own writer and reader, with pickles and shards that it names itself."""
    source = write_pipeline(tmp_path / "src", safe_serialization=False, variant="fp16")
    quiet(convert, source, tmp_path / "ours")
    quiet(export, tmp_path / "ours", tmp_path / "back")
    theirs = Kandinsky3Pipeline.from_pretrained(source, variant="fp16")
    ours = Kandinsky3Pipeline.from_pretrained(tmp_path / "back")
    for component in ("unet", "movq", "text_encoder"):
        expected = dict(getattr(theirs, component).state_dict())
        assert_equal(dict(getattr(ours, component).state_dict()), expected)
    for component in ("unet", "movq"):
        expected = getattr(theirs, component).config
        for key, value in getattr(ours, component).config.items():
            assert key[0] == "_" or expected[key] == value, key
    for key, value in theirs.scheduler.config.items():
        assert key[0] == "_" or ours.scheduler.config[key] == value, key
    text = "A lighthouse in a storm"
    assert ours.tokenizer(text).input_ids == theirs.tokenizer(text).input_ids


def test_original_31(original, tmp_path):
    source, ours, states = original
    quiet(export, ours, tmp_path / "back", "original")
    back = tmp_path / "back"
    main = torch.load(back / "kandinsky3.pt", weights_only=True)
    assert main.keys() == {"unet", "null_embedding"}
    assert_equal(main["unet"], states["unet"])
    assert torch.equal(main["null_embedding"], states["null_embedding"])
    assert_equal(load(back, "movq.pt"), states["movq"])
    encoder = back / "flan_ul2_encoder"
    assert_equal(load(encoder, "projection.pt"), states["text_projection"])
    assert_equal(load(encoder, "pytorch_model*.bin"), states["text_encoder"])
    assert {p.name for p in source.rglob("*.pt")} == {p.name for p in back.rglob("*.pt")}
    assert (encoder / "spiece.model").read_bytes() == torch_checkpoints.spiece_model()


@pytest.mark.slow
def test_original_30(tmp_path):
    states = write_original(tmp_path / "src", version="3.0")
    quiet(convert, tmp_path / "src", tmp_path / "ours", architecture=ARCHITECTURE)
    quiet(export, tmp_path / "ours", tmp_path / "back", "original")
    main = torch.load(tmp_path / "back" / "kandinsky3.pt", weights_only=True)
    assert_equal(main["unet"], states["unet"])
    projections = {f"t5.{name}": t for name, t in states["text_projection"].items()}
    assert_equal(main["projections"], projections)
    assert torch.equal(main["null_embedding"], states["null_embedding"])


def test_variants_share_the_text_encoder(original, tmp_path):
    """Also: 9 input channels, which the original layout can hold and diffusers cannot."""
    _, base, _ = original
    states = write_original(tmp_path / "src", torch.bfloat16, variant="inpainting")
    for file in (tmp_path / "src" / "flan_ul2_encoder").glob("[!p]*"):
        file.unlink()  # neither weights nor tokenizer, only projection_inpainting.pt
    for file in (tmp_path / "src" / "flan_ul2_encoder").glob("pytorch_model*"):
        file.unlink()
    ours = tmp_path / "ours"
    quiet(
        convert,
        tmp_path / "src",
        ours,
        variant="inpainting",
        text_encoder_from=base,
        architecture=ARCHITECTURE,
    )
    assert not (ours / "text_encoder").exists()
    checkpoint = read_checkpoint(ours)
    assert os.path.samefile(checkpoint.component_path("text_encoder"), base / "text_encoder")
    assert (ours / "tokenizer" / "tokenizer.json").exists()
    assert checkpoint.config.sampler.threshold_percentile == 0.95
    assert leaf_shapes(ours, "unet")["conv_in.kernel"].shape == (3, 3, 9, 16)
    assert leaf_shapes(ours, "unet")["conv_out.kernel"].shape == (3, 3, 16, 4)
    quiet(export, ours, tmp_path / "back", "original")
    main = torch.load(tmp_path / "back" / "kandinsky3_inpainting.pt", weights_only=True)
    assert_equal(main["unet"], states["unet"])
    projection = load(tmp_path / "back" / "flan_ul2_encoder", "projection_inpainting.pt")
    assert_equal(projection, states["text_projection"])
    with pytest.raises(ConversionError, match="out_channels = 9 with 9 input channels"):
        quiet(export, ours, tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_original_to_diffusers(original, tmp_path):
    _, ours, _ = original
    with pytest.warns(UserWarning, match="conditions them in its own way"):
        quiet(export, ours, tmp_path / "back")
    pipe = Kandinsky3Pipeline.from_pretrained(tmp_path / "back", dtype=torch.bfloat16)
    expected = torch_checkpoints.cast(torch_checkpoints.state_dicts()["unet"], torch.bfloat16)
    assert_equal(dict(pipe.unet.state_dict()), expected)
    found = dict(pipe.movq.state_dict())
    assert not found.pop("quantize.embedding.weight").any()
    expected = torch_checkpoints.cast(torch_checkpoints.state_dicts()["movq"], torch.bfloat16)
    expected.pop("quantize.embedding.weight")
    assert_equal(found, expected)


def test_diffusers_to_original(converted, tmp_path):
    _, ours, states = converted
    with pytest.warns(UserWarning, match="null embedding of the original layout is set to"):
        quiet(export, ours, tmp_path / "back", "original", variant="flash")
    main = torch.load(tmp_path / "back" / "kandinsky3_flash.pt", weights_only=True)
    assert torch.equal(
        main["null_embedding"], states["unet"]["encoder_hid_proj.projection_norm.bias"]
    )
    expected = torch_checkpoints.original_state_dicts(torch.float16)["unet"]
    assert_equal(main["unet"], expected)
    # And what was written is a source again.
    source = from_torch.open_source(tmp_path / "back", variant="flash", architecture=ARCHITECTURE)
    from_torch.plan(source, "it")


def test_param_dtype_and_restored_weights(converted, tmp_path):
    source, ours, states = converted
    quiet(convert, source, tmp_path / "ours", param_dtype="bfloat16")
    for component in states:
        dtypes = {
            struct.dtype.name for struct in leaf_shapes(tmp_path / "ours", component).values()
        }
        assert dtypes == {"bfloat16"}
    assert read_checkpoint(tmp_path / "ours").dtype == "bfloat16"
    encoder = restore(ours, "text_encoder", param_dtype="float32")
    wo = states["text_encoder"]["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
    np.testing.assert_array_equal(encoder.layers.mlp.wo.kernel[1], wo.T)
    q = states["text_encoder"]["encoder.block.0.layer.0.SelfAttention.q.weight"]
    np.testing.assert_array_equal(encoder.layers.attention.q.kernel[0], q.T.float())


def test_the_source_hash_follows_the_weights(converted, tmp_path):
    source, ours, states = converted
    noted = read_checkpoint(ours).source
    assert noted["layout"] == "diffusers" and noted["variant"] == "base"
    assert noted["path"] == str(source)
    name = "up_blocks.1.resnets_out.1.resnet_blocks.2.projection.bias"
    changed = states["unet"][name].clone()
    changed[3] += 1
    write_diffusers(
        tmp_path / "src",
        torch.float16,
        variant="fp16",
        float32_wo=True,
        changes={"unet": {name: changed}},
    )
    quiet(convert, tmp_path / "src", tmp_path / "ours")
    other = read_checkpoint(tmp_path / "ours")
    assert other.source["sha256"] != noted["sha256"]
    assert other.fingerprint != read_checkpoint(ours).fingerprint


def test_tiny_config_is_what_the_fixtures_hold(converted):
    """So that the other tests of this file really compare the tiny models."""
    assert read_checkpoint(converted[1]).config.unet == UNET
