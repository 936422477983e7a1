# SPDX-License-Identifier: Apache-2.0
"""Sixth stage of `tiny`: the U-Net goes on with all noise levels weighing nearly the same.

What lies where is learned by now; the edges of shapes and their textures are decided at low noise,
that the stages before have trained least.

k3jax train --config tiny_details
"""

from k3jax.configs.tiny_unet import get_config as tiny_unet


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
