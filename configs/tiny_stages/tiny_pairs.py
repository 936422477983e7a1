# SPDX-License-Identifier: Apache-2.0
"""Seventh stage of `tiny`: the U-Net learns which colour, shape and size belong to which object.

Three quarters of the scenes have two objects. The text projection is frozen, because the
inpainting model shares it.

k3jax train --config tiny_pairs
"""

from k3jax.configs.tiny_stages.tiny_details import get_config as tiny_details


def get_config():
    config = tiny_details()
    config.checkpoint = "train/tiny/details/checkpoint"
    config.train.output = "train/tiny/pairs"
    config.train.components = ("unet",)
    config.train.steps = 3600
    config.train.sample_every = 1200
    config.train.data.scene_mix = "pairs"
    config.train.data.cache = "train/tiny/pairs_latents"
    config.train.loss.layout_weight = 8.0
    config.train.optimizer.learning_rate = 2.5e-3
    return config
