# SPDX-License-Identifier: Apache-2.0
"""The architecture of PyTorch checkpoints, from config.json or from the tensors' shapes."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from k3jax.config import (
    ModelConfig,
    MoVQConfig,
    SamplerConfig,
    TextEncoderConfig,
    TextProjectionConfig,
    UNetConfig,
    from_dict,
    suggestion,
)
from k3jax.convert.rules import ConversionError, Shape, Table
from k3jax.sampling.samplers import make_sampler


Json = Mapping[str, Any]


def text_encoder_config(values: Json, where: str) -> TextEncoderConfig:
    """From transformers' config.json of a T5; what an encoder does not use is passed over."""
    feed_forward = values.get("feed_forward_proj", "relu")
    if feed_forward != "gated-silu":
        raise ConversionError(
            f"{where}: feed_forward_proj is {feed_forward!r}; only the encoder of Flan-UL2 "
            "('gated-silu') is supported."
        )
    known = TextEncoderConfig.__dataclass_fields__
    return _from_dict(TextEncoderConfig, {k: v for k, v in values.items() if k in known}, where)


_UNET_DEFAULTS = {
    "in_channels": 4,
    "time_embedding_dim": 1536,
    "groups": 32,
    "attention_head_dim": 64,
    "layers_per_block": 3,
    "block_out_channels": (384, 768, 1536, 3072),
    "cross_attention_dim": 4096,
    "encoder_hid_dim": 4096,
}


def unet_config(values: Json, where: str) -> tuple[UNetConfig, TextProjectionConfig]:
    """From diffusers' config.json of a Kandinsky3UNet, which holds the text projection as well.

    diffusers has as many output channels as input channels, half as many channels before the first
    level as in it, and fixed attention flags.
    """
    values = {k: v for k, v in values.items() if not k.startswith("_")}
    for key in values.keys() - _UNET_DEFAULTS.keys():
        near = suggestion(key, set(_UNET_DEFAULTS))
        raise ConversionError(f"{where}: {key!r} is no setting of a Kandinsky3UNet{near}.")
    values = {**_UNET_DEFAULTS, **values}
    projection = {
        "d_model": values.pop("encoder_hid_dim"),
        "cross_attention_dim": values["cross_attention_dim"],
        "null_embedding": False,
    }
    projection = _from_dict(TextProjectionConfig, projection, where)
    (first, *_) = _widths(values, where)
    values["out_channels"] = values["in_channels"]
    values["init_channels"] = first // 2
    return _from_dict(UNetConfig, values, where), projection


_MOVQ_FIELDS = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 3,
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "num_vq_embeddings": 256,
    "vq_embed_dim": None,
}
_MOVQ_WITHOUT_EFFECT = {"sample_size", "scaling_factor", "force_upcast", "lookup_from_codebook"}


def movq_config(values: Json, where: str) -> MoVQConfig:
    """From diffusers' config.json of a VQModel."""
    values = {k: v for k, v in values.items() if not k.startswith("_")}
    values = {"block_out_channels": (64,), **values}
    plain = len(_widths(values, where)) - 1
    wanted = {
        "norm_type": ("spatial", "group"),
        "act_fn": ("silu", "silu"),
        "mid_block_add_attention": (True, True),
        "down_block_types": (
            ["DownEncoderBlock2D"] * plain + ["AttnDownEncoderBlock2D"],
            ["DownEncoderBlock2D"],
        ),
        "up_block_types": (
            ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * plain,
            ["UpDecoderBlock2D"],
        ),
    }
    for key, (needed, default) in wanted.items():
        value = values.pop(key, default)
        if (list(value) if isinstance(value, tuple) else value) != needed:
            raise ConversionError(
                f"{where}: {key} is {value!r}; a MoVQ of Kandinsky has {needed!r}."
            )
    for key in values.keys() - _MOVQ_FIELDS.keys() - _MOVQ_WITHOUT_EFFECT:
        near = suggestion(key, set(_MOVQ_FIELDS))
        raise ConversionError(f"{where}: {key!r} is no setting of a VQModel{near}.")
    values = {k: values.get(k, default) for k, default in _MOVQ_FIELDS.items()}
    if values["vq_embed_dim"] is None:
        values["vq_embed_dim"] = values["latent_channels"]
    return _from_dict(MoVQConfig, values, where)


_SCHEDULERS = {"DDPMScheduler": "ddpm", "DDIMScheduler": "ddim"}
_SCHEDULER_DEFAULTS = {
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "steps_offset": 0,
}
"""Where diffusers' defaults differ from ours, which are those of the shipped file."""
_SCHEDULER_UNSUPPORTED = {"trained_betas": None, "rescale_betas_zero_snr": False}


def sampler_config(values: Json, where: str) -> SamplerConfig:
    """From diffusers' scheduler_config.json; 25 steps and w = 3 are its pipeline's defaults."""
    kind = values.get("_class_name", "DDPMScheduler")
    if not isinstance(kind, str) or kind not in _SCHEDULERS:
        raise ConversionError(
            f"{where}: the scheduler {kind} is not supported; known are {', '.join(_SCHEDULERS)}."
        )
    for key, only in _SCHEDULER_UNSUPPORTED.items():
        if values.get(key, only) != only:
            raise ConversionError(f"{where}: {key} = {values[key]!r} is not supported.")
    values = {k: v for k, v in values.items() if not k.startswith("_")}
    known = set(SamplerConfig.__dataclass_fields__) - {"name", "num_inference_steps", "eta"}
    unknown = sorted(values.keys() - known - _SCHEDULER_UNSUPPORTED.keys())
    if unknown:
        warnings.warn(f"{where}: {', '.join(unknown)} are settings without effect.", stacklevel=2)
    settings = {k: v for k, v in values.items() if k in known}
    return _from_dict(
        SamplerConfig,
        {
            **_SCHEDULER_DEFAULTS,
            **settings,
            "name": _SCHEDULERS[kind],
            "num_inference_steps": 25,
            "guidance_scale": 3.0,
        },
        where,
    )


def original_sampler(layout: str, variant: str) -> SamplerConfig:
    """The defaults of the original pipelines, which are code there."""
    if variant == "flash":
        return SamplerConfig(name="flash", num_inference_steps=4, guidance_scale=0.0)
    name = "kandinsky30" if layout == "original30" else "kandinsky"
    if variant == "inpainting":
        return SamplerConfig(name=name, guidance_scale=4.0, threshold_percentile=0.95)
    return SamplerConfig(name=name)


class Shapes:
    """Our names and shapes of a PyTorch state dict, asked for the architecture that they show."""

    def __init__(self, table: Table, torch_shapes: Mapping[str, Shape]):
        self._component = table.component
        self._table = table
        self.shapes: dict[str, Shape] = {}
        for name, shape in torch_shapes.items():
            for rule, ours in table.from_torch(name)[:1]:
                moved = rule.jax_shape(tuple(shape))
                if moved is not None:
                    self.shapes[ours] = moved

    def __getitem__(self, name: str) -> Shape:
        if name not in self.shapes:
            theirs = " or ".join(torch for _, torch in self._table.from_jax(name))
            raise ConversionError(
                f"{self._component}: the architecture cannot be told, since {theirs} is missing or "
                "has the wrong number of axes."
            )
        if 0 in self.shapes[name]:
            raise ConversionError(
                f"{self._component}: the architecture cannot be told, since our {name} is empty."
            )
        return self.shapes[name]

    def count(self, prefix: str) -> int:
        """How many members the list `prefix` has; 0 when there is none."""
        members = {
            n[len(prefix) + 1 :].split(".")[0] for n in self.shapes if n.startswith(prefix + ".")
        }
        return len(members)


def inferred_text_encoder(shapes: Shapes) -> TextEncoderConfig:
    buckets, heads = shapes["relative_attention_bias.embedding"]
    vocab_size, d_model = shapes["embed_tokens.embedding"]
    return TextEncoderConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=shapes["layers.0.attention.q.kernel"][1] // heads,
        d_ff=shapes["layers.0.mlp.wi_0.kernel"][1],
        num_layers=shapes.count("layers"),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )


def inferred_projection(shapes: Shapes) -> TextProjectionConfig:
    d_model, width = shapes["linear.kernel"]
    return TextProjectionConfig(d_model, width, null_embedding="null_embedding" in shapes.shapes)


def inferred_unet(shapes: Shapes) -> UNetConfig:
    """Head dim 64 and 32 groups, which leave no trace in the shapes, are taken for granted."""
    levels = shapes.count("down_blocks")
    *_, in_channels, init_channels = shapes["conv_in.kernel"]
    widths = [
        shapes[f"down_blocks.{level}.resnets_out.0.blocks.3.conv.kernel"][3]
        for level in range(levels)
    ]
    hidden = shapes["down_blocks.0.resnets_in.0.blocks.0.conv.kernel"][3]
    inner = (s for name, s in shapes.shapes.items() if name.endswith("feed_forward_in.kernel"))
    width, wide = next(inner, (1, 4))
    return UNetConfig(
        in_channels=in_channels,
        out_channels=shapes["conv_out.kernel"][3],
        init_channels=init_channels,
        block_out_channels=tuple(widths),
        layers_per_block=shapes.count("down_blocks.0.resnets_in"),
        time_embedding_dim=shapes["time_embedding.linear_1.kernel"][1],
        cross_attention_dim=shapes["context_pooling.attention.to_k.kernel"][0],
        expansion_ratio=wide // width,
        compression_ratio=max(init_channels, widths[0]) // hidden,
        add_cross_attention=_flags(shapes, levels, "cross_attentions"),
        add_self_attention=_flags(shapes, levels, "self_attention"),
    )


def _flags(shapes: Shapes, levels: int, name: str) -> tuple[bool, ...]:
    """The flags behind the levels: one per level, or the references' 4 where these show.

    The up path reads the flags backwards from their end, so with 4 flags and fewer levels the two
    paths see different ones.
    """
    down = [shapes.count(f"down_blocks.{level}.{name}") > 0 for level in range(levels)]
    up = [shapes.count(f"up_blocks.{level}.{name}") > 0 for level in range(levels)]
    if up == down[::-1]:
        return tuple(down)
    flags = down + up[::-1][max(0, 2 * levels - 4) :]
    return tuple(flags)


def inferred_movq(shapes: Shapes) -> MoVQConfig:
    """32 groups in the encoder's norms are taken for granted."""
    levels = shapes.count("encoder.down_blocks")
    blocks = [f"encoder.down_blocks.{level}.resnets" for level in range(levels)]
    *_, latent_channels, vq_embed_dim = shapes["quant_conv.kernel"]
    return MoVQConfig(
        in_channels=shapes["encoder.conv_in.kernel"][2],
        out_channels=shapes["decoder.conv_out.kernel"][3],
        latent_channels=latent_channels,
        block_out_channels=tuple(shapes[f"{block}.0.conv1.kernel"][3] for block in blocks),
        layers_per_block=shapes.count(blocks[0]) if blocks else 0,
        num_vq_embeddings=shapes.shapes.get("codebook.embedding", (0,))[0],
        vq_embed_dim=vq_embed_dim,
    )


def model_config(where: str, **parts) -> ModelConfig:
    """ModelConfig of these parts; a ConversionError where they do not belong together."""
    try:
        config = ModelConfig(**parts)
        with np.errstate(all="ignore"):
            rows = make_sampler(config.sampler).rows  # refuses schedules that it does not know
        if not all(np.isfinite(row).all() for row in rows.values()):
            raise ValueError("sampler: its betas make infinite or undefined steps.")
        return config
    except ValueError as error:
        raise ConversionError(f"{where}: {error}") from None


def _widths(values: Json, where: str) -> list[int]:
    """block_out_channels, of which other settings follow."""
    widths = values["block_out_channels"]
    if (
        not isinstance(widths, list | tuple)
        or not widths
        or not all(type(w) is int for w in widths)
    ):
        raise ConversionError(
            f"{where}: block_out_channels is {widths!r}, where a list of integers is expected."
        )
    return list(widths)


def _from_dict(cls, values, where):
    try:
        return from_dict(cls, values, where)
    except ValueError as error:
        at = "" if where in str(error) else f"{where}: "
        raise ConversionError(f"{at}{error}") from None
