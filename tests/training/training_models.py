# SPDX-License-Identifier: Apache-2.0
"""The smallest models that have every kind of layer, for tests of training; without PyTorch."""

import dataclasses

import numpy as np
from flax import nnx

from k3jax.config import (
    ModelConfig,
    MoVQConfig,
    SamplerConfig,
    TextEncoderConfig,
    TextProjectionConfig,
    UNetConfig,
)
from k3jax.sharding import RULES, shardings

from random_checkpoint import VOCAB_SIZE


WIDTH = 16
# One level: attention to itself and to the text, down and up, in a fraction of the compile time.
UNET = UNetConfig(
    init_channels=8,
    block_out_channels=(16,),
    layers_per_block=2,
    time_embedding_dim=16,
    cross_attention_dim=WIDTH,
    attention_head_dim=4,
    groups=4,
    add_cross_attention=(True,),
    add_self_attention=(True,),
)
MODEL = ModelConfig(
    TextEncoderConfig(
        vocab_size=VOCAB_SIZE, d_model=WIDTH, d_kv=4, d_ff=24, num_layers=2, num_heads=2
    ),
    TextProjectionConfig(d_model=WIDTH, cross_attention_dim=WIDTH, null_embedding=False),
    UNET,
    MoVQConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1, norm_num_groups=8),
    conditioning="diffusers",
    sample_size=64,
    sampler=SamplerConfig(num_inference_steps=2),
)
# Enough channels to learn something.
WIDE = dataclasses.replace(
    MODEL,
    unet=dataclasses.replace(
        UNET, init_channels=16, block_out_channels=(32,), time_embedding_dim=32
    ),
)


def relative_error(ours, theirs) -> float:
    """Largest difference as a share of the reference's largest value."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def module_shardings(module, mesh):
    """A module whose leaves are the shardings of `module` on a mesh, for jax.device_put."""
    return nnx.merge(nnx.split(module)[0], shardings(module, mesh, RULES))
