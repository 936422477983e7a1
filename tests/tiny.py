# SPDX-License-Identifier: Apache-2.0
"""Tiny PyTorch models with random weights, and the k3jax configs that describe them.

PyTorch and diffusers are imported by the functions that need them: it takes 7 CPU seconds.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from flax import nnx

from k3jax.config import (
    ModelConfig,
    MoVQConfig,
    TextEncoderConfig,
    TextProjectionConfig,
    UNetConfig,
)
from k3jax.convert import keys
from k3jax.convert.modules import state_dict_to_module
from k3jax.model.abstract import abstract_module
from k3jax.sharding import RULES, shardings


if TYPE_CHECKING:
    import torch
    from diffusers import Kandinsky3UNet, VQModel
    from transformers import T5EncoderModel


VOCAB = 259  # of the byte tokenizer
TEXT_ENCODER = TextEncoderConfig(
    vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
)
PROJECTION = TextProjectionConfig(d_model=32, cross_attention_dim=48, null_embedding=False)
UNET = UNetConfig(
    init_channels=16,
    block_out_channels=(32, 32, 64, 64),
    layers_per_block=2,
    time_embedding_dim=32,
    cross_attention_dim=48,
    attention_head_dim=8,
    groups=8,
)
MOVQ = MoVQConfig(
    block_out_channels=(32, 32, 64, 64),
    layers_per_block=1,
    norm_num_groups=8,
    num_vq_embeddings=16,
)
CONFIG = ModelConfig(TEXT_ENCODER, PROJECTION, UNET, MOVQ, conditioning="diffusers")

# Two levels compile in a third of the time of four: for tests of what stands around the U-Net.
SHALLOW_UNET = dataclasses.replace(UNET, block_out_channels=(32, 64))
SHALLOW = dataclasses.replace(CONFIG, unet=SHALLOW_UNET)


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random weights for every tensor, also those that PyTorch starts at zero or one.

    Scaled so that activations keep their size; otherwise parity would prove little.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if "context_mlp" in name:
                tensor.copy_(noise * 0.1)
            elif "conv_y.bias" in name:
                tensor.copy_(1 + 0.1 * noise)
            elif tensor.ndim >= 2 and "embed" not in name:
                fan_in = tensor[0].numel()
                tensor.copy_(noise * fan_in**-0.5)
            elif "norm" in name and name.endswith("weight"):
                tensor.copy_(1 + 0.2 * noise)
            else:
                tensor.copy_(noise * 0.3)
    return module.eval()


def torch_text_encoder(config: TextEncoderConfig = TEXT_ENCODER, seed: int = 1) -> T5EncoderModel:
    from transformers import T5Config, T5EncoderModel

    fields = dataclasses.asdict(config)
    model = T5EncoderModel(
        T5Config(**fields, feed_forward_proj="gated-silu", dropout_rate=0.0, is_decoder=False)
    )
    return randomise(model, seed)


def torch_unet(config: UNetConfig = UNET, seed: int = 2) -> Kandinsky3UNet:
    """diffusers' U-Net, with the text projection inside it."""
    from diffusers import Kandinsky3UNet

    model = Kandinsky3UNet(
        in_channels=config.in_channels,
        time_embedding_dim=config.time_embedding_dim,
        groups=config.groups,
        attention_head_dim=config.attention_head_dim,
        layers_per_block=config.layers_per_block,
        block_out_channels=config.block_out_channels,
        cross_attention_dim=config.cross_attention_dim,
        encoder_hid_dim=PROJECTION.d_model,
    )
    return randomise(model, seed)


def torch_movq(config: MoVQConfig = MOVQ, seed: int = 3) -> VQModel:
    from diffusers import VQModel

    levels = len(config.block_out_channels)
    model = VQModel(
        down_block_types=["DownEncoderBlock2D"] * (levels - 1) + ["AttnDownEncoderBlock2D"],
        up_block_types=["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * (levels - 1),
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        vq_embed_dim=config.vq_embed_dim,
        num_vq_embeddings=config.num_vq_embeddings,
        norm_num_groups=config.norm_num_groups,
        norm_type="spatial",
    )
    return randomise(model, seed)


def ours(component: str, config: ModelConfig, state_dict, dialect: str = "diffusers"):
    """The JAX module with the weights of a PyTorch state dict, float32."""
    module = abstract_module(component, config)
    return state_dict_to_module(keys.table(component, dialect), state_dict, module)


def nhwc(tensor) -> np.ndarray:
    """PyTorch's b c h w -> our b h w c, as numpy."""
    return np.moveaxis(np.asarray(tensor), 1, -1)


def nchw(array) -> torch.Tensor:
    """Our b h w c -> PyTorch's b c h w."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(array), -1, 1)))


def relative_error(ours, theirs) -> float:
    """Largest difference as a share of the reference's largest value."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def module_shardings(module, mesh, rules=RULES):
    """A module whose leaves are the shardings of `module` on a mesh, for jax.device_put."""
    graph, _ = nnx.split(module)
    return nnx.merge(graph, shardings(module, mesh, rules))
