# SPDX-License-Identifier: Apache-2.0
"""Eighth stage of `tiny`: the U-Net with pairs of objects, and more scenes that count.

`tiny_pairs` improves objects and relations, and has few scenes that train counts.

k3jax train --config tiny_several
"""

from k3jax.configs.tiny_stages.tiny_pairs import get_config as tiny_pairs


def get_config():
    config = tiny_pairs()
    config.checkpoint = "train/tiny/pairs/checkpoint"
    config.train.output = "train/tiny/several"
    config.train.steps = 1800
    config.train.sample_every = 600
    config.train.data.scene_mix = "several"
    config.train.data.cache = "train/tiny/several_latents"
    return config
