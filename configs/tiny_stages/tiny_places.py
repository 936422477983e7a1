# SPDX-License-Identifier: Apache-2.0
"""Fourth stage of `tiny`: text projection and U-Net learn positions only.

Its scenes have captions with positions, at the noise levels that decide them. A U-Net that
learns everything at once learns colours and shapes and ignores positions.

k3jax train --config tiny_places
"""

from k3jax.configs.tiny_stages.tiny_unet import get_config as tiny_unet


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
