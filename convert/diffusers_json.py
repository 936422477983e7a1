# SPDX-License-Identifier: Apache-2.0
"""The JSON files of diffusers' and transformers' layout: to our configuration, and back."""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any

from k3jax.config import (
    ModelConfig,
    MoVQConfig,
    SamplerConfig,
    TextEncoderConfig,
    TextProjectionConfig,
    UNetConfig,
    suggestion,
)
from k3jax.convert.architecture import SAMPLER_ALONE, config_from_dict
from k3jax.convert.rules import ConversionError


Json = Mapping[str, Any]


# --- reading ------------------------------------------------------------------------------------


def text_encoder_config(values: Json, where: str) -> TextEncoderConfig:
    """From transformers' config.json of a T5; settings that an encoder does not use are ignored."""
    feed_forward = values.get("feed_forward_proj", "relu")
    if feed_forward != "gated-silu":
        raise ConversionError(
            f"{where}: feed_forward_proj is {feed_forward!r}; only the encoder of Flan-UL2 "
            "('gated-silu') is supported."
        )
    known = TextEncoderConfig.__dataclass_fields__
    return config_from_dict(
        TextEncoderConfig, {k: v for k, v in values.items() if k in known}, where
    )


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
    projection = config_from_dict(TextProjectionConfig, projection, where)
    (first, *_) = _widths(values, where)
    values["out_channels"] = values["in_channels"]
    values["init_channels"] = first // 2
    return config_from_dict(UNetConfig, values, where), projection


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
    required = {
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
    for key, (needed, default) in required.items():
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
    return config_from_dict(MoVQConfig, values, where)


_SCHEDULERS = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpm++2m",
}
_SCHEDULER_DEFAULTS = {
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "steps_offset": 0,
}
"""Where diffusers' defaults differ from ours, which are those of the released file."""
_SCHEDULER_FIXED = {"trained_betas": None, "rescale_betas_zero_snr": False}
_DPM_FIXED = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -math.inf,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
}
"""The only value of a setting that is supported, which is its default."""
_DPM_WITHOUT_EFFECT = (
    *("lower_order_final", "euler_at_final", "flow_shift", "time_shift_type", "variance_type"),
)


def sampler_config(values: Json, where: str) -> SamplerConfig:
    """From diffusers' scheduler_config.json; 25 steps and w = 3 are its pipeline's defaults."""
    kind = values.get("_class_name", "DDPMScheduler")
    if not isinstance(kind, str) or kind not in _SCHEDULERS:
        raise ConversionError(
            f"{where}: the scheduler {kind} is not supported; known are {', '.join(_SCHEDULERS)}: "
            "use the scheduler_config.json of one of them."
        )
    name = _SCHEDULERS[kind]
    values = {k: v for k, v in values.items() if not k.startswith("_")}
    fixed, defaults = _SCHEDULER_FIXED, _SCHEDULER_DEFAULTS
    if name == "dpm++2m":
        fixed, defaults = fixed | _DPM_FIXED, {**defaults, "timestep_spacing": "linspace"}
        values = {k: v for k, v in values.items() if k not in _DPM_WITHOUT_EFFECT}
    for key, only in fixed.items():
        if values.pop(key, only) != only:
            raise ConversionError(f"{where}: {kind} is only supported with {key} = {only!r}.")
    known = set(SamplerConfig.__dataclass_fields__) - {"name", "num_inference_steps", "eta"}
    unknown = sorted(values.keys() - known)
    if unknown:
        warnings.warn(f"{where}: {', '.join(unknown)} are settings without effect.", stacklevel=2)
    settings = {k: v for k, v in values.items() if k in known}
    fixed = {"name": name, "num_inference_steps": 25, "guidance_scale": 3.0}
    return config_from_dict(SamplerConfig, {**defaults, **settings, **fixed}, where)


def _widths(values: Json, where: str) -> list[int]:
    """block_out_channels, from which other settings follow."""
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


# --- writing ------------------------------------------------------------------------------------

DIFFUSERS_VERSION = "0.36.0"
CODEBOOK_ROWS = 16384
"""Rows of the codebook that diffusers' VQModel must have; the released one's number."""


def model_index_json(tokenizer_class: str) -> dict[str, Any]:
    """model_index.json of a Kandinsky3Pipeline.

    Args:
        tokenizer_class: of transformers, which can read the checkpoint's tokenizer.
    """
    return {
        "_class_name": "Kandinsky3Pipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "movq": ["diffusers", "VQModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", tokenizer_class],
        "unet": ["diffusers", "Kandinsky3UNet"],
    }


def text_encoder_json(config: TextEncoderConfig, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        **dataclasses.asdict(config),
        "feed_forward_proj": "gated-silu",
        "dense_act_fn": "silu",
        "is_gated_act": True,
        "dropout_rate": 0.0,
        "is_encoder_decoder": True,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }


def unet_json(config: ModelConfig) -> dict[str, Any]:
    """config.json of a Kandinsky3UNet.

    Raises:
        ConversionError: diffusers has no such U-Net.
    """
    unet = config.unet
    needed = {
        "out_channels": unet.in_channels,
        "init_channels": unet.block_out_channels[0] // 2,
        "expansion_ratio": 4,
        "compression_ratio": 2,
        "add_cross_attention": (False, True, True, True),
        "add_self_attention": (False, True, True, True),
    }
    for name, value in needed.items():
        if getattr(unet, name) != value:
            raise ConversionError(
                f"diffusers' Kandinsky3UNet has {name} = {value} with {unet.in_channels} input "
                f"channels, this U-Net has {getattr(unet, name)}: export it in the original layout."
            )
    return {
        "_class_name": "Kandinsky3UNet",
        "_diffusers_version": DIFFUSERS_VERSION,
        "in_channels": unet.in_channels,
        "time_embedding_dim": unet.time_embedding_dim,
        "groups": unet.groups,
        "attention_head_dim": unet.attention_head_dim,
        "layers_per_block": unet.layers_per_block,
        "block_out_channels": list(unet.block_out_channels),
        "cross_attention_dim": unet.cross_attention_dim,
        "encoder_hid_dim": config.text_projection.d_model,
    }


def movq_json(config: MoVQConfig) -> dict[str, Any]:
    plain = len(config.block_out_channels) - 1
    return {
        "_class_name": "VQModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu",
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "latent_channels": config.latent_channels,
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * plain + ["AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * plain,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "norm_type": "spatial",
        "num_vq_embeddings": config.num_vq_embeddings or CODEBOOK_ROWS,
        "vq_embed_dim": config.vq_embed_dim,
        "sample_size": 32,
        "scaling_factor": 0.18215,
    }


def scheduler_json(config: SamplerConfig) -> dict[str, Any]:
    """scheduler_config.json of the DDPM scheduler, which Kandinsky3Pipeline comes with."""
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in SAMPLER_ALONE}
    return {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        **fields,
        "trained_betas": None,
        "rescale_betas_zero_snr": False,
    }
