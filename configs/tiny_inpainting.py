# SPDX-License-Identifier: Apache-2.0
"""Last stage of `tiny`: the U-Net with 9 input channels, from that with 4 of the sixth stage.

k3jax train --config tiny_inpainting
"""

from k3jax.configs.tiny_details import get_config as tiny_details


def get_config():
    config = tiny_details()
    config.checkpoint = "train/tiny/details/checkpoint"
    config.train.task = "inpainting"
    config.train.output = "train/tiny/inpainting"
    config.train.components = ("unet",)  # the text projection stays that of the base
    config.train.steps = 1000
    config.train.ema_decay = 0.998
    config.train.sample_every = 0
    config.train.data.num_scenes = 12_288
    config.train.data.cache = "train/tiny/inpainting_latents"
    config.train.optimizer.learning_rate = 3e-3
    config.train.optimizer.final_learning_rate = 3e-5
    return config
