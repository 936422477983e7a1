# SPDX-License-Identifier: Apache-2.0
"""Every setting of a model comes back from an export; and what k3jax.json may not say."""

import dataclasses
import json
import math
import random
import typing

import pytest

from k3jax.checkpoints.format import read_checkpoint
from k3jax.config import (
    ModelConfig,
    MoVQConfig,
    SamplerConfig,
    TextEncoderConfig,
    TextProjectionConfig,
    UNetConfig,
    to_dict,
)
from k3jax.convert import keys
from k3jax.convert.architecture import (
    Shapes,
    inferred_movq,
    inferred_projection,
    inferred_unet,
    model_config,
    original_sampler,
    own_settings,
    with_own_settings,
)
from k3jax.convert.diffusers_json import (
    movq_config,
    movq_json,
    sampler_config,
    scheduler_json,
    text_encoder_config,
    text_encoder_json,
    unet_config,
    unet_json,
)
from k3jax.convert.from_torch import convert
from k3jax.convert.modules import layer_shapes, module_shapes
from k3jax.convert.to_torch import export
from k3jax.model.abstract import abstract_module

from conversions import quiet, refused
from torch_checkpoints import write_original


FLAGS = (False, True, True, True)


def odd_config(rng: random.Random, layout: str) -> ModelConfig:
    """A model as nobody trains it, that the layout can hold."""
    groups, head_dim = rng.choice((1, 2, 3, 8, 16)), rng.choice((1, 2, 5, 8, 24))
    unit = math.lcm(2 * groups, head_dim)
    init = unit * rng.randint(2, 3)
    levels = rng.randint(1, 4)
    widths = (2 * init, *(unit * rng.randint(1, 6) for _ in range(levels - 1)))
    channels, width, d_model = rng.choice((4, 9)), rng.randint(1, 70), rng.randint(1, 70)
    free = layout == "original"
    flags = [tuple(rng.random() < 0.5 for _ in range(levels)) if free else FLAGS for _ in range(2)]
    unet_part = UNetConfig(
        in_channels=channels,
        out_channels=4 if free else channels,
        init_channels=init,
        block_out_channels=widths,
        layers_per_block=rng.randint(2, 4),
        time_embedding_dim=head_dim * rng.randint(1, 9),
        cross_attention_dim=width,
        attention_head_dim=head_dim,
        groups=groups,
        expansion_ratio=4,
        add_cross_attention=flags[0],
        add_self_attention=flags[1],
    )
    movq_part = MoVQConfig(
        in_channels=rng.randint(1, 4),
        out_channels=rng.randint(1, 4),
        latent_channels=rng.randint(1, 9),
        block_out_channels=tuple(32 * rng.randint(1, 4) for _ in range(rng.randint(1, 5))),
        layers_per_block=rng.randint(1, 3),
        norm_num_groups=rng.choice((1, 2, 8, 32)),
        num_vq_embeddings=0 if free else rng.randint(1, 99),
        vq_embed_dim=rng.randint(1, 9),
    )
    encoder = TextEncoderConfig(
        *(rng.randint(1, 99), d_model, *(rng.randint(1, 50) for _ in range(4))),
        relative_attention_num_buckets=4 * rng.randint(1, 20),
        relative_attention_max_distance=rng.randint(21, 300),
        layer_norm_epsilon=10 ** rng.uniform(-9, -3),
    )
    projection = TextProjectionConfig(d_model, width, null_embedding=free)
    return ModelConfig(
        encoder,
        projection,
        unet_part,
        movq_part,
        conditioning=layout,
        sample_size=64 * rng.randint(1, 40),
        sampler=odd_sampler(rng),
    )


def odd_sampler(rng: random.Random) -> SamplerConfig:
    """Every field drawn anew, whatever fields there will be."""
    known = {"beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2")}
    known |= {"variance_type": ("fixed_small", "fixed_large"), "name": ("ddpm", "ddim", "dpm++2m")}
    values = {}
    for name, hint in typing.get_type_hints(SamplerConfig).items():
        if name in known or typing.get_origin(hint) is typing.Literal:
            values[name] = rng.choice(known.get(name) or typing.get_args(hint))
        else:
            draws = {bool: rng.random() < 0.5, int: rng.randint(1, 900), float: rng.random()}
            values[name] = draws[hint]
    values["num_train_timesteps"] = rng.randint(900, 2000)
    values["steps_offset"] = rng.randint(0, 1)
    values |= {name: rng.uniform(1e-5, 0.02) for name in ("beta_start", "beta_end")}
    return SamplerConfig(**values)


def through_json(values):
    return json.loads(json.dumps(values))


def differences(found: ModelConfig, expected: ModelConfig) -> dict:
    parts = {}
    for field in dataclasses.fields(ModelConfig):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if a != b:
            parts[field.name] = (a, b)
    return parts


def diffusers_round_trip(config: ModelConfig) -> ModelConfig:
    unet_part, projection = unet_config(through_json(unet_json(config)), "unet")
    parts = {
        "text_encoder": text_encoder_config(
            through_json(text_encoder_json(config.text_encoder, "float32")), "text_encoder"
        ),
        "text_projection": projection,
        "unet": unet_part,
        "movq": movq_config(through_json(movq_json(config.movq)), "movq"),
        "conditioning": "diffusers",
        "sampler": sampler_config(through_json(scheduler_json(config.sampler)), "scheduler"),
    }
    values = through_json(own_settings(config, "diffusers"))
    return model_config("it", **with_own_settings(parts, values, "k3jax.json"))


def original_round_trip(config: ModelConfig) -> ModelConfig:
    tables = {
        "text_projection": keys.table("text_projection", "original"),
        "unet": keys.table("unet", "original"),
        "movq": keys.table("movq", "original", levels=len(config.movq.block_out_channels)),
    }
    infer = {"text_projection": inferred_projection, "unet": inferred_unet, "movq": inferred_movq}
    parts = {"conditioning": "original", "sampler": original_sampler("original", "base")}
    for name, table in tables.items():
        ours = layer_shapes(table, module_shapes(abstract_module(name, config)))
        torch = {step.torch_name: step.torch_shape for step in table.to_torch(ours).steps}
        parts[name] = infer[name](Shapes(table, torch))
    parts["text_encoder"] = text_encoder_config(
        through_json(text_encoder_json(config.text_encoder, "float32")), "text_encoder"
    )
    values = through_json(own_settings(config, "original"))
    return model_config("it", **with_own_settings(parts, values, "k3jax.json"))


def test_every_setting_comes_back_from_the_diffusers_layout():
    rng = random.Random(0)
    for number in range(300):
        config = odd_config(rng, "diffusers")
        assert not differences(diffusers_round_trip(config), config), number


@pytest.mark.parametrize("models", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_every_setting_comes_back_from_the_original_layout(models):
    rng = random.Random(1)
    for number in range(models):
        config = odd_config(rng, "original")
        assert not differences(original_round_trip(config), config), number


@pytest.mark.parametrize("layout", ["original", pytest.param("diffusers", marks=pytest.mark.slow)])
def test_exported_and_converted_again(converted, tmp_path, layout):
    """The files themselves, and no --config: an original checkpoint says its groups, too."""
    _, ours, _ = converted
    config = read_checkpoint(ours).config
    sampler = dataclasses.replace(config.sampler, num_inference_steps=7, eta=0.5, name="ddim")
    content = (ours / "config.json").read_text()
    values = json.loads(content)
    changed = {**values, "sample_size": 128, "sampler": to_dict(sampler)}
    (ours / "config.json").write_text(json.dumps(changed))
    try:
        quiet(export, ours, tmp_path / "torch", layout)
    finally:
        (ours / "config.json").write_text(content)
    quiet(convert, tmp_path / "torch", tmp_path / "again")
    again = read_checkpoint(tmp_path / "again").config
    expected = dataclasses.replace(config, sample_size=128, sampler=sampler)
    if layout == "original":  # as the warning of the export says
        expected = dataclasses.replace(
            expected,
            conditioning="original",
            movq=dataclasses.replace(config.movq, num_vq_embeddings=0),
            text_projection=dataclasses.replace(config.text_projection, null_embedding=True),
        )
    assert not differences(again, expected)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "k3jax.json is damaged: it is not JSON"),
        ('{"sample_size": "128"}', "sample_size is '128', not an integer"),
        ('{"sample_size": 0}', "sample_size is 0; it must be between 1 and"),
        ('{"sampler": {"etta": 1}}', "k3jax.json: sampler has no key 'etta' (did you mean 'eta'"),
        ('{"sampler": 3}', "has no group of settings 'sampler'"),
        ('{"conditioning": "original"}', "k3jax.json has no group of settings 'conditioning'"),
    ],
)
def test_wrong_settings_are_named(copy, tmp_path, text, message):
    (copy / "k3jax.json").write_text(text)
    assert message in refused(copy, tmp_path)


def test_variants_of_the_original_have_files_of_their_own(tmp_path):
    for variant in ("base", "flash"):
        write_original(tmp_path / "src", variant=variant)
    (tmp_path / "src" / "k3jax_flash.json").write_text('{"sample_size": "x"}')
    assert "k3jax_flash.json" in refused(tmp_path / "src", tmp_path, variant="flash")
    assert "k3jax_flash.json" not in refused(tmp_path / "src", tmp_path)
