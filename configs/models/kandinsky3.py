# SPDX-License-Identifier: Apache-2.0
"""Kandinsky 3.1, text to image, as in the original files (3.0: `kandinsky30`).

    k3jax convert ai-forever/Kandinsky3.1 weights/kandinsky3 --config kandinsky3
    k3jax generate "a corgi in a house made of sushi" --config kandinsky3

The command line overrides a value as in --config.generate.num_inference_steps=30. What a config
leaves out comes from the checkpoint (`model`, `generate`) or has a default.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.checkpoint = "weights/kandinsky3"

    # The encoder of Flan-UL2: 8.72 B parameters.
    config.model = model = ConfigDict()
    model.text_encoder = ConfigDict()
    model.text_encoder.vocab_size = 32128
    model.text_encoder.d_model = 4096
    model.text_encoder.d_kv = 256
    model.text_encoder.d_ff = 16384
    model.text_encoder.num_layers = 32
    model.text_encoder.num_heads = 16
    model.text_encoder.relative_attention_num_buckets = 32
    model.text_encoder.relative_attention_max_distance = 128
    model.text_encoder.layer_norm_epsilon = 1e-6

    model.text_projection = ConfigDict()
    model.text_projection.d_model = 4096
    model.text_projection.cross_attention_dim = 4096
    model.text_projection.null_embedding = True

    # 3.04 B parameters. Four levels, the last one at an eighth of the latents' size.
    model.unet = ConfigDict()
    model.unet.in_channels = 4
    model.unet.out_channels = 4
    model.unet.init_channels = 192
    model.unet.block_out_channels = (384, 768, 1536, 3072)
    model.unet.layers_per_block = 3
    model.unet.time_embedding_dim = 1536
    model.unet.cross_attention_dim = 4096
    model.unet.attention_head_dim = 64
    model.unet.groups = 32
    model.unet.expansion_ratio = 4
    model.unet.compression_ratio = 2
    model.unet.add_cross_attention = (False, True, True, True)
    model.unet.add_self_attention = (False, True, True, True)

    # 0.27 B parameters. One latent per 8 x 8 pixels.
    model.movq = ConfigDict()
    model.movq.in_channels = 3
    model.movq.out_channels = 3
    model.movq.latent_channels = 4
    model.movq.block_out_channels = (256, 512, 512, 1024)
    model.movq.layers_per_block = 2
    model.movq.norm_num_groups = 32
    model.movq.num_vq_embeddings = 0
    model.movq.vq_embed_dim = 4

    model.conditioning = "original"
    model.sample_size = 1024

    model.sampler = ConfigDict()
    model.sampler.name = "kandinsky"
    model.sampler.num_inference_steps = 50
    model.sampler.guidance_scale = 3.0
    model.sampler.eta = 1.0
    model.sampler.threshold_percentile = 0.99

    config.pipeline = ConfigDict()
    config.pipeline.mesh = "data=-1"
    config.pipeline.dtype = "bfloat16"

    config.convert = ConfigDict()
    config.convert.variant = "base"
    return config
