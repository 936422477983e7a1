# SPDX-License-Identifier: Apache-2.0
"""The small model that ships inside k3jax: all components of Kandinsky 3, for drawings of shapes.

    k3jax generate "a red circle above a blue square"
    k3jax train --config tiny

The second command trains the weights again, in nine stages, into train/tiny. It takes hours on two
CPU cores, and resumes where it stopped. The captions that the model knows: `k3jax.scenes.caption`.
"""

from ml_collections import ConfigDict

from k3jax.configs.models.kandinsky3 import get_config as kandinsky3


def get_config():
    config = kandinsky3()
    config.checkpoint = None  # the weights in the package

    text_encoder = config.model.text_encoder
    text_encoder.vocab_size = 416  # the tokenizer's own 411, rounded up
    text_encoder.d_model = 96
    text_encoder.d_kv = 24
    text_encoder.d_ff = 192
    text_encoder.num_layers = 4
    text_encoder.num_heads = 4

    config.model.text_projection.d_model = 96
    config.model.text_projection.cross_attention_dim = 96
    config.model.text_projection.null_embedding = False

    unet = config.model.unet
    unet.init_channels = 32  # half of the first level, as in diffusers
    unet.block_out_channels = (64, 96, 96)
    unet.layers_per_block = 2
    unet.time_embedding_dim = 96
    unet.cross_attention_dim = 96
    unet.attention_head_dim = 16
    unet.groups = 8

    config.model.movq.block_out_channels = (32, 32, 64, 64)
    config.model.movq.layers_per_block = 1
    config.model.movq.norm_num_groups = 8

    # The conditioning of diffusers, so that diffusers can run these weights.
    config.model.conditioning = "diffusers"
    config.model.sample_size = 128
    config.model.sampler.name = "ddpm"
    config.model.sampler.num_inference_steps = 25

    config.train = ConfigDict()
    config.train.stages = (
        "tiny_text_encoder",
        "tiny_movq",
        "tiny_decoder",
        "tiny_places",
        "tiny_unet",
        "tiny_details",
        "tiny_pairs",
        "tiny_several",
        "tiny_inpainting",
    )
    return config
