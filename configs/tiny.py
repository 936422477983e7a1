# SPDX-License-Identifier: Apache-2.0
"""The form of Kandinsky 3 in seconds on a laptop: every part, small. The demo has it.

k3jax generate "a red circle" --config tiny
"""

from k3jax.configs.kandinsky3 import get_config as kandinsky3


def get_config():
    config = kandinsky3()
    config.checkpoint = None  # the demo, with random weights

    text_encoder = config.model.text_encoder
    text_encoder.vocab_size = 259  # three special tokens and one for each byte
    text_encoder.d_model = 64
    text_encoder.d_kv = 16
    text_encoder.d_ff = 128
    text_encoder.num_layers = 2
    text_encoder.num_heads = 4

    config.model.text_projection.d_model = 64
    config.model.text_projection.cross_attention_dim = 64

    unet = config.model.unet
    unet.init_channels = 32
    unet.block_out_channels = (32, 64, 64, 128)
    unet.layers_per_block = 2
    unet.time_embedding_dim = 128
    unet.cross_attention_dim = 64
    unet.attention_head_dim = 16
    unet.groups = 16

    config.model.movq.block_out_channels = (32, 32, 64, 64)
    config.model.movq.layers_per_block = 1

    config.model.sample_size = 128
    config.model.sampler.num_inference_steps = 25
    return config
