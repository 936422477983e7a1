# SPDX-License-Identifier: Apache-2.0
"""The key tables: complete at full size, invertible, strict, and bit for bit."""

import functools
import hashlib
import itertools
import math

import pytest
import torch
from diffusers import Kandinsky3UNet, VQModel
from transformers import T5Config, T5EncoderModel

from k3jax.config import ModelConfig, MoVQConfig
from k3jax.convert import keys
from k3jax.convert.modules import (
    layer_shapes,
    module_shapes,
)
from k3jax.convert.rules import (
    Rule,
    Table,
    under,
)
from k3jax.model.abstract import abstract_module


TABLES = {
    "text_encoder": keys.table("text_encoder"),
    "text_projection diffusers": keys.table("text_projection"),
    "text_projection original": keys.table("text_projection", "original"),
    "text_projection original30": keys.table("text_projection", "original30"),
    "text_projection fork": keys.table("text_projection", "fork"),
    "unet diffusers": keys.table("unet"),
    "unet original": keys.table("unet", "original"),
    "movq diffusers": keys.table("movq"),
    "movq original": keys.table("movq", "original", levels=4),
}


@functools.cache
def released(component: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released model in diffusers' dialect; no weights are made."""
    with torch.device("meta"):
        if component == "unet":
            module = Kandinsky3UNet()
        elif component == "movq":
            module = VQModel(
                down_block_types=["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"],
                up_block_types=["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 3,
                block_out_channels=(256, 512, 512, 1024),
                layers_per_block=2,
                latent_channels=4,
                vq_embed_dim=4,
                num_vq_embeddings=16384,
                norm_type="spatial",
            )
        else:
            config = T5Config(
                vocab_size=32128,
                d_model=4096,
                d_kv=256,
                d_ff=16384,
                num_layers=32,
                num_heads=16,
                feed_forward_proj="gated-silu",
            )
            module = T5EncoderModel(config)
    return {name: tuple(t.shape) for name, t in module.state_dict().items()}


@functools.cache
def model_shapes(component: str, config: ModelConfig):
    return module_shapes(abstract_module(component, config))


def expected(component: str, config: ModelConfig, table: Table):
    return layer_shapes(table, model_shapes(component, config))


def count(shapes) -> int:
    return sum(map(math.prod, shapes.values()))


def original_names(component: str) -> dict[str, tuple[int, ...]]:
    """The released model in the names of the original code, by way of ours."""
    theirs, original = TABLES[f"{component} diffusers"], TABLES[f"{component} original"]
    names = {}
    for name, shape in released(component).items():
        for rule, ours in theirs.from_torch(name):
            for back, original_name in original.from_jax(ours):
                names[original_name] = back.torch_shape(rule.jax_shape(shape))
    return names


def test_unet_of_diffusers_has_a_place_for_every_tensor():
    found = released("unet")
    assert (len(found), count(found)) == (1071, 3_055_348_228)
    config = ModelConfig()
    tables = TABLES["unet diffusers"], TABLES["text_projection diffusers"]
    plan = tables[0].to_jax(found, expected("unet", config, tables[0]))
    assert not plan.faults and len(plan.steps) == 1068
    mine = {name for name in found if tables[1].from_torch(name)}
    assert {step.torch_name for step in plan.steps} | mine == set(found)
    assert not mine & {step.torch_name for step in plan.steps}


def test_movq_of_diffusers_has_a_place_for_every_tensor():
    found = released("movq")
    config = ModelConfig(movq=MoVQConfig(num_vq_embeddings=16384))
    table = TABLES["movq diffusers"]
    plan = table.to_jax(found, expected("movq", config, table))
    assert not plan.faults and len(plan.steps) == 431
    assert count(found) == 270_603_567 + 16384 * 4


def test_text_encoder_has_a_place_for_every_tensor():
    found = released("text_encoder")
    table = TABLES["text_encoder"]
    plan = table.to_jax(found, expected("text_encoder", ModelConfig(), table))
    assert not plan.faults
    assert plan.duplicates == [("encoder.embed_tokens.weight", "shared.weight")]
    assert sum(math.prod(step.jax_shape) for step in plan.steps) == 8_721_797_632


@pytest.mark.parametrize(
    "component, tensors, parameters, digest",
    [
        (
            "unet",
            1068,
            3_038_562_820,
            "1daa198f8318c806e7bc19700162451c6538f8741f88dbe84dd1db5b515b79d5",
        ),
        (
            "movq",
            430,
            270_603_567,
            "9c066b67f05412b2297264aa3883b03d4913f48338c599b9d64444a8dd121cb3",
        ),
    ],
)
def test_original_names_are_those_of_the_original_code(component, tensors, parameters, digest):
    """No package ships the original code. Its state dicts' names and shapes were listed once; the
    digest of that list is compared."""
    names = original_names(component)
    assert (len(names), count(names)) == (tensors, parameters)
    lines = "".join(f"{name} {shape}\n" for name, shape in sorted(names.items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == digest
    table = TABLES[f"{component} original"]
    plan = table.to_jax(names, expected(component, ModelConfig(), table))
    assert not plan.faults and len(plan.steps) == tensors


def test_known_pairs_of_names():
    pairs = {
        "unet": {
            "up_samples.2.resnet_attn_blocks.1.1.attention.output_layer.weight": (
                "up_blocks.2.attentions.2.attention.to_out.0.weight"
            ),
            "down_samples.1.self_attention_block.feed_forward.2.weight": (
                "down_blocks.1.attentions.0.feed_forward.2.weight"
            ),
            "to_time_embed.3.bias": "time_embedding.linear_2.bias",
        },
        "movq": {
            "decoder.up.3.block.2.norm1.conv_y.weight": (
                "decoder.up_blocks.0.resnets.2.norm1.conv_y.weight"
            ),
            "encoder.mid.block_2.norm2.norm_layer.bias": ("encoder.mid_block.resnets.1.norm2.bias"),
            "decoder.mid.attn_1.norm.norm_layer.weight": (
                "decoder.mid_block.attentions.0.spatial_norm.norm_layer.weight"
            ),
        },
    }
    for component, names in pairs.items():
        for original, diffusers in names.items():
            ((_, ours),) = TABLES[f"{component} original"].from_torch(original)
            ((_, theirs),) = TABLES[f"{component} diffusers"].from_jax(ours)
            assert theirs == diffusers


@pytest.mark.parametrize("name", TABLES)
def test_every_row_is_a_bijection(name):
    """Each name that a row can make is read back by that row alone, on both sides."""
    table = TABLES[name]
    for rule, torch_side, jax_side in table._compiled:
        fields = {field[1]: len(field[4]) or 4 for field in jax_side._fields}
        for values in itertools.product(*map(range, fields.values())):
            values = dict(zip(fields, values, strict=True))
            theirs, ours = torch_side.write(values), jax_side.write(values)
            assert table.from_torch(theirs) == [(rule, ours)]
            if not rule.alias:
                assert table.from_jax(ours) == [(rule, theirs)]
        if rule.layout:
            shape = tuple(
                1 if axis == "1" else size for size, axis in enumerate(rule.layout.split()[:4], 2)
            )[: len(rule.layout.split("->")[0].split())]
            assert rule.torch_shape(rule.jax_shape(shape)) == shape


def test_an_unknown_prefix_of_all_names_is_named():
    """In one line, and not one line for each of a thousand tensors."""
    table, names = TABLES["unet diffusers"], ("conv_in.bias", "conv_out.bias", "conv_in.weight")
    for prefix in ("model.diffusion_model.", "module."):
        plan = table.to_jax({f"{prefix}{name}": (4,) for name in names}, {"conv_in.bias": (4,)})
        (fault,) = plan.faults
        assert f"the first is {prefix}conv_in.bias" in str(fault) and f"'{prefix}'" in str(fault)
    (fault,) = table.to_jax({"a.b": (1,)}, {"conv_in.bias": (4,)}).faults
    assert "none of its 1 tensors has a known name; the first is a.b." in str(fault)


def test_templates_that_count_from_the_other_end():
    table = Table("x", [Rule("up.{last-i}.w", "up.{i}.w")], constants={"last": 2})
    assert [table.from_torch(f"up.{i}.w")[0][1] for i in range(3)] == ["up.2.w", "up.1.w", "up.0.w"]
    assert table.from_torch("up.3.w") == []  # there is no level 3
    assert table.from_torch("up.01.w") == []  # nor any other way to write 1


def test_under_prefixes_both_sides():
    (rule,) = under("a.{n}", "b.{n}", [Rule("w", "k", "o i -> i o", alias=True)])
    assert rule == Rule("a.{n}.w", "b.{n}.k", "o i -> i o", alias=True)


def test_doubled_tensors_are_faults_and_aliases_must_be_equal():
    table = Table("x", [Rule("a", "w"), Rule("b", "w"), Rule("c", "w", alias=True)])
    assert "a and b are both w" in str(table.to_jax({"a": (1,), "b": (1,)}, {"w": (1,)}).faults[0])
    plan = table.to_jax({"c": (1,), "a": (1,)}, {"w": (1,)})
    assert plan.duplicates == [("c", "a")] and not plan.faults
    assert not table.to_jax({"c": (1,)}, {"w": (1,)}).faults
    overlapping = Table("x", [Rule("a.{n}", "b.{n}"), Rule("a.0", "c")])
    assert "more than one row" in str(overlapping.to_jax({"a.0": (1,)}, {"c": (1,)}).faults[0])


def test_the_decoder_of_a_whole_t5_is_left_out():
    table = TABLES["text_encoder"]
    assert table.ignores("decoder.block.3.layer.0.SelfAttention.q.weight")
    assert table.ignores("lm_head.weight")
    assert not table.ignores("encoder.block.3.something.weight")
