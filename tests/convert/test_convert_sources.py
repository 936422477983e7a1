# SPDX-License-Identifier: Apache-2.0
"""Finding, opening and refusing PyTorch checkpoints; nothing is converted here."""

import json
import math
import shutil
import warnings

import pytest
import torch

from k3jax.config import SamplerConfig
from k3jax.convert.diffusers_json import (
    movq_config,
    sampler_config,
    text_encoder_config,
    unet_config,
)
from k3jax.convert.from_torch import plan
from k3jax.convert.layouts import find_layout
from k3jax.convert.rules import ConversionError
from k3jax.convert.sources import open_source
from k3jax.convert.tensors import flat, open_weights, unwrapped
from k3jax.sampling.samplers import make_sampler

import tiny
import torch_checkpoints
from conversions import PUBLISHED, refused
from torch_checkpoints import ARCHITECTURE, UNET, write_diffusers, write_original


# Architecture


def test_diffusers_checkpoint_is_described_by_its_configs(diffusers):
    source = open_source(diffusers)
    assert source.layout == "diffusers"
    assert source.config == tiny.CONFIG.__class__(
        tiny.TEXT_ENCODER,
        tiny.PROJECTION,
        UNET,
        tiny.MOVQ,
        conditioning="diffusers",
        sampler=SamplerConfig(name="ddpm", num_inference_steps=25),
    )
    plan(source, "it")


@pytest.mark.parametrize(
    "variant, sampler",
    [
        ("base", SamplerConfig("kandinsky", 50, 3.0, 1.0, 0.99)),
        ("flash", SamplerConfig("flash", 4, 0.0)),
        ("inpainting", SamplerConfig("kandinsky", 50, 4.0, 1.0, 0.95)),
    ],
)
def test_original_checkpoint_is_described_by_its_shapes(original, variant, sampler):
    source = open_source(original, variant=variant, architecture=ARCHITECTURE)
    channels = 9 if variant == "inpainting" else 4
    assert source.config.unet == UNET.__class__(**{**vars(UNET), "in_channels": channels})
    assert source.config.movq == tiny.MOVQ.__class__(**{**vars(tiny.MOVQ), "num_vq_embeddings": 0})
    assert source.config.text_projection.null_embedding
    assert source.config.conditioning == "original"
    assert source.config.sampler == sampler
    plan(source, "it")


def test_original_in_a_weights_folder_and_without_config_json(original, tmp_path):
    shutil.copytree(original, tmp_path / "weights")
    (tmp_path / "weights" / "flan_ul2_encoder" / "config.json").unlink()
    source = open_source(tmp_path, architecture=ARCHITECTURE)
    assert source.config.text_encoder == tiny.TEXT_ENCODER  # read off the shapes
    assert source.config.unet.attention_head_dim == UNET.attention_head_dim
    with pytest.raises(ConversionError, match=r"do not split into unet\.groups = 32"):
        open_source(tmp_path)  # what leaves no trace in shapes is that of the released model


def test_original_30_has_its_projection_inside(tmp_path):
    write_original(tmp_path, version="3.0")
    source = open_source(tmp_path, architecture=ARCHITECTURE)
    assert (source.layout, source.config.sampler.name) == ("original30", "kandinsky30")
    plans = plan(source, "it")
    names = {step.torch_name for step in plans["text_projection"].steps}
    assert names == {"t5.0.weight", "t5.1.weight", "t5.1.bias", "null_embedding"}
    assert plans["text_encoder"].duplicates == [("encoder.embed_tokens.weight", "shared.weight")]


def test_the_authors_own_names_in_diffusers_layout(tmp_path):
    """As the first uploads had them, pickled, with the projection inside the U-Net."""
    write_diffusers(tmp_path, pickles=True)
    states = torch_checkpoints.original_state_dicts()
    names = {"0.weight": "lin.weight", "1.weight": "ln.weight", "1.bias": "ln.bias"}
    projection = {f"projection_{new}": states["text_projection"][n] for n, new in names.items()}
    file = tmp_path / "unet" / "diffusion_pytorch_model.bin"
    torch_checkpoints.save({**states["unet"], **projection}, file)
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNetKandi3"}')
    source = open_source(tmp_path, architecture={"unet": ARCHITECTURE["unet"]})
    assert source.config.unet == UNET and source.config.text_projection == tiny.PROJECTION
    plans = plan(source, "it")
    assert sum(len(p.steps) for p in plans.values()) == sum(map(len, source.tensors.values()))
    with pytest.raises(ConversionError, match="'vae', which is no component"):
        open_source(tmp_path, architecture={"vae": {}})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_names_of_wrapped_models(tmp_path, prefix):
    """As DataParallel and torch.compile save them: in shards, and in a part of a pickle."""
    state = {f"{prefix}a.weight": torch.ones(2), f"{prefix}module.bias": torch.ones(3)}
    for number, name in enumerate(state):
        torch_checkpoints.save({name: state[name]}, tmp_path / f"{number}.safetensors")
    with pytest.warns(UserWarning, match=f"every name starts with '{prefix}'"):
        found = open_weights(sorted(tmp_path.glob("*.safetensors")))
    assert found.keys() == {"a.weight", "module.bias"}
    other = flat({**state, "b": torch.ones(1)}, tmp_path)
    assert unwrapped(other).keys() == {*state, "b"}


@pytest.mark.parametrize("levels", [2, 3])
def test_flags_of_models_with_fewer_levels(levels):
    """The references zip 4 flags from both ends with the levels (semantics of the up path)."""
    from diffusers import Kandinsky3UNet

    from k3jax.convert import keys
    from k3jax.convert.architecture import Shapes, inferred_unet

    model = Kandinsky3UNet(
        block_out_channels=(32, 64, 64)[:levels],
        layers_per_block=2,
        groups=8,
        attention_head_dim=8,
        time_embedding_dim=16,
        cross_attention_dim=16,
        encoder_hid_dim=16,
    )
    found = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    config = inferred_unet(Shapes(keys.table("unet"), found))
    assert config.add_cross_attention == config.add_self_attention == (False, True, True, True)
    assert config.block_out_channels == (32, 64, 64)[:levels]


def test_configs_that_are_not_kandinsky():
    with pytest.raises(ConversionError, match="only the encoder of Flan-UL2"):
        text_encoder_config({"feed_forward_proj": "relu"}, "config.json")
    with pytest.raises(ConversionError, match="'group_count' is no setting"):
        unet_config({"group_count": 3}, "config.json")
    with pytest.raises(ConversionError, match="norm_type is 'group'"):
        movq_config({"norm_type": "group"}, "config.json")
    with pytest.raises(ConversionError, match="EulerDiscreteScheduler is not supported"):
        sampler_config({"_class_name": "EulerDiscreteScheduler"}, "scheduler_config.json")
    with pytest.raises(ConversionError, match="rescale_betas_zero_snr"):
        sampler_config({"rescale_betas_zero_snr": True}, "scheduler_config.json")
    dpm = {"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -math.inf}
    for key, value in (("solver_order", 3), ("use_karras_sigmas", True)):
        with pytest.raises(ConversionError, match=f"only supported with {key} = "):
            sampler_config({**dpm, key: value}, "scheduler_config.json")
    with pytest.raises(ConversionError, match=r"beta_start must be float"):
        sampler_config({"beta_start": "x"}, "scheduler_config.json")
    with pytest.warns(UserWarning, match="sigma_min are settings without effect"):
        found = sampler_config({"sigma_min": 1, "clip_sample": False}, "scheduler_config.json")
    assert not found.clip_sample and found.steps_offset == 0 and found.beta_schedule == "linear"


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_dpm_solver_of_diffusers_has_our_timesteps(spacing):
    """Its own config, as it writes it; that the steps are equal is shown in tests/sampling."""
    from diffusers import DPMSolverMultistepScheduler

    theirs = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", timestep_spacing=spacing, lower_order_final=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = sampler_config(json.loads(theirs.to_json_string()), "scheduler_config.json")
    assert config.name == "dpm++2m" and config.timestep_spacing == spacing
    theirs.set_timesteps(config.num_inference_steps)
    timesteps = make_sampler(config).rows["timestep"]
    assert timesteps.tolist() == theirs.timesteps.tolist()


# Files


def test_only_what_is_needed_is_picked():
    other = ["README.md", "unet/diffusion_pytorch_model.fp16.bin", "movq/model.onnx"]
    layout = find_layout([*PUBLISHED, *other], "it")
    needed = set(PUBLISHED) - {"model_index.json", "text_encoder/model.safetensors.index.fp16.json"}
    assert set(layout.files()) == needed
    without = find_layout(PUBLISHED, "it", text_encoder=False)
    assert "text_encoder" not in without.weights


def test_plain_files_are_preferred_and_variants_can_be_asked_for():
    names = [*PUBLISHED, *(name.replace(".fp16", "") for name in PUBLISHED)]
    assert "fp16" not in "".join(find_layout(names, "it").files())
    chosen = find_layout(names, "it", weights_variant="fp16")
    assert all("fp16" in file for files in chosen.weights.values() for file in files)
    new = [
        name.replace("model.fp16-", "model-").replace("-of-00005.", "-of-00005.fp16.")
        for name in PUBLISHED
    ]
    assert len(find_layout(new, "it").weights["text_encoder"]) == 5
    with pytest.raises(ConversionError, match="no bf16 weights but fp16"):
        find_layout(PUBLISHED, "it", weights_variant="bf16")


@pytest.mark.parametrize(
    "missing, message",
    [
        ("unet/diffusion_pytorch_model.fp16.safetensors", "lacks unet"),
        ("movq/config.json", "lacks movq/config.json"),
        ("tokenizer/spiece.model", "lacks the tokenizer"),
        ("text_encoder/model.fp16-00003-of-00005.safetensors", "lacks shard 3 of 5"),
    ],
)
def test_missing_files_are_named(missing, message):
    with pytest.raises(ConversionError, match=message):
        find_layout([name for name in PUBLISHED if name != missing], "here")


def test_unknown_layouts_say_what_was_looked_for(tmp_path, original):
    message = refused(tmp_path, tmp_path)
    assert "neither model_index.json" in message and "kandinsky3.pt" in message
    with pytest.raises(ConversionError, match=r"lacks movq.*text encoder.*tokenizer"):
        find_layout(["kandinsky3.pt"], "here")
    with pytest.raises(ConversionError, match="--variant flash"):
        find_layout(["weights/kandinsky3_flash.pt"], "here")
    with pytest.raises(ConversionError, match="9 input channels"):
        find_layout(PUBLISHED, "here", variant="inpainting")
    (original / "flan_ul2_encoder" / "projection_flash.pt").rename(tmp_path / "away")
    with pytest.raises(ConversionError, match="no projection file of the variant flash"):
        open_source(original, variant="flash")
    (tmp_path / "away").rename(original / "flan_ul2_encoder" / "projection_flash.pt")


def test_places_that_are_no_checkpoint(tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(tmp_path / "file", tmp_path)
    for place in ("nowhere", "./no/where", "a/b/c", str(tmp_path / "none")):
        assert "neither a folder nor a Hugging Face id" in refused(place, tmp_path)
