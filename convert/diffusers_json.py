# SPDX-License-Identifier: Apache-2.0
"""The JSON files of diffusers' layout, from our configuration; the inverse of architecture.py."""

import dataclasses
from typing import Any

from k3jax.config import ModelConfig, MoVQConfig, SamplerConfig, TextEncoderConfig
from k3jax.convert.architecture import SAMPLER_ALONE
from k3jax.convert.rules import ConversionError


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
