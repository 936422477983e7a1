# SPDX-License-Identifier: Apache-2.0
"""Fourth stage of `tiny`: text projection and U-Net learn what lies where, and nothing else.

Only scenes whose caption says where something is, at the noise levels at which that is decided. A
U-Net that learns all at once reads colours and shapes and takes positions for noise.

k3jax train --config tiny_places
"""

from k3jax.configs.tiny_unet import get_config as tiny_unet


def get_config():
    config = tiny_unet()
    config.checkpoint = "train/tiny/decoder/checkpoint"
    config.train.output = "train/tiny/places"
    config.train.from_scratch = True
    config.train.steps = 1400
    config.train.sample_every = 700
    config.train.data.num_scenes = 16_384
    config.train.data.scene_mix = "places"
    config.train.data.cache = "train/tiny/places_latents"
    config.train.loss.timesteps = (600, 950)
    config.train.loss.layout_weight = 30.0
    config.train.optimizer.learning_rate = 6e-3
    config.train.optimizer.final_learning_rate = 1e-3
    return config
