# SPDX-License-Identifier: Apache-2.0
"""Sixth stage of `tiny`: the U-Net with nearly equal weights for all noise levels.

The earlier stages taught positions, at high noise. Edges and textures are decided at low noise,
which those stages trained least.

k3jax train --config tiny_details
"""

from k3jax.configs.tiny_stages.tiny_unet import get_config as tiny_unet


def get_config():
    config = tiny_unet()
    config.checkpoint = "train/tiny/unet/checkpoint"
    config.train.output = "train/tiny/details"
    config.train.steps = 3600
    config.train.sample_every = 1200
    config.train.data.num_scenes = 24_576
    config.train.data.cache = "train/tiny/details_latents"
    config.train.loss.layout_weight = 3.0
    return config
