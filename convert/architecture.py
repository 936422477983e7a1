# SPDX-License-Identifier: Apache-2.0
"""The architecture of checkpoints without config.json: from k3jax.json, or from tensors' shapes.

An export writes k3jax.json beside the weights, with the settings for which PyTorch's layouts have
no place; other programs ignore it. A conversion reads it, so that a model comes back with its image
size and sampler, and needs no --config.
"""

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
    to_dict,
)
from k3jax.convert.rules import ConversionError, Shape, Table
from k3jax.sampling.samplers import make_sampler


SAMPLER_ALONE = ("name", "num_inference_steps", "guidance_scale", "eta", "threshold_percentile")
"""Settings of a sampler that diffusers' scheduler_config.json does not have."""
_PARTS = ("sampler", "unet", "movq")


def settings_file(layout: str, end: str) -> str:
    """Name of the file; `end` is what the original files of a variant append to their names."""
    return "k3jax.json" if layout == "diffusers" else f"k3jax{end}.json"


def own_settings(config: ModelConfig, layout: str) -> dict[str, Any]:
    """The content of the file.

    In the original layout no other file describes the U-Net and the MoVQ (which has no codebook).
    """
    values = to_dict(config)
    if layout == "diffusers":
        sampler = {name: values["sampler"][name] for name in SAMPLER_ALONE}
        return {"sample_size": config.sample_size, "sampler": sampler}
    movq = {**values["movq"], "num_vq_embeddings": 0}
    return {
        "sample_size": config.sample_size,
        "sampler": values["sampler"],
        "unet": values["unet"],
        "movq": movq,
    }


def with_own_settings(
    parts: Mapping[str, Any], values: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The parts of a ModelConfig, with the values of the file.

    Raises:
        ConversionError: an unknown setting, or one of a wrong type.
    """
    parts = dict(parts)
    for key, value in values.items():
        if key == "sample_size":
            if type(value) is not int:
                raise ConversionError(f"{where}: sample_size is {value!r}, not an integer.")
            parts[key] = value
        elif key not in _PARTS or not isinstance(value, Mapping):
            near = suggestion(key, {"sample_size", *_PARTS})
            raise ConversionError(f"{where} has no group of settings {key!r}{near}.")
        else:
            part = parts[key]
            parts[key] = config_from_dict(type(part), {**to_dict(part), **value}, f"{where}: {key}")
    return parts


def original_sampler(layout: str, variant: str) -> SamplerConfig:
    """The defaults of the original pipelines, which are code there."""
    if variant == "flash":
        return SamplerConfig(name="flash", num_inference_steps=4, guidance_scale=0.0)
    name = "kandinsky30" if layout == "original30" else "kandinsky"
    if variant == "inpainting":
        return SamplerConfig(name=name, guidance_scale=4.0, threshold_percentile=0.95)
    return SamplerConfig(name=name)


class Shapes:
    """Our names and shapes of a PyTorch state dict, from which the architecture is inferred."""

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
                f"{self._component}: the architecture is unknown, since {theirs} is missing or "
                "has the wrong number of axes."
            )
        if 0 in self.shapes[name]:
            raise ConversionError(
                f"{self._component}: the architecture is unknown, since our {name} is empty."
            )
        return self.shapes[name]

    def count(self, prefix: str) -> int:
        """The number of members of the list `prefix`; 0 without the list."""
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
    """Assumes head dim 64 and 32 groups, which the shapes do not show."""
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
    """The attention flags of the levels: one per level, or the references' 4 if the shapes show 4.

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
    """Assumes 32 groups in the encoder's norms, which the shapes do not show."""
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


def config_from_dict(cls, values: Mapping[str, Any], where: str):
    """A part of a ModelConfig; a ConversionError that names the file where a value is wrong."""
    try:
        return from_dict(cls, values, where)
    except ValueError as error:
        at = "" if where in str(error) else f"{where}: "
        raise ConversionError(f"{at}{error}") from None
