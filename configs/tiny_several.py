# SPDX-License-Identifier: Apache-2.0
"""Eighth stage of `tiny`: the U-Net goes on with two objects, and counts more again.

`tiny_pairs` brought objects and relations far up and let counts fall, of which it has few scenes.

k3jax train --config tiny_several
"""

from k3jax.configs.tiny_pairs import get_config as tiny_pairs


def get_config():
    config = tiny_pairs()
    config.checkpoint = "train/tiny/pairs/checkpoint"
    config.train.output = "train/tiny/several"
    config.train.steps = 1800
    config.train.sample_every = 600
    config.train.data.scene_mix = "several"
    config.train.data.cache = "train/tiny/several_latents"
    return config
