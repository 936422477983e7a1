# SPDX-License-Identifier: Apache-2.0
"""Last stage of `tiny`: the U-Net with 9 input channels, from the 4 channels of the eighth stage.

Half of the masks are the box of an object, because people mostly replace objects.

k3jax train --config tiny_inpainting
"""

from ml_collections import ConfigDict

from k3jax.configs.tiny_stages.tiny_several import get_config as tiny_several


def get_config():
    config = tiny_several()
    config.checkpoint = "train/tiny/several/checkpoint"
    config.train.task = "inpainting"
    config.train.output = "train/tiny/inpainting"
    config.train.seed = 13
    config.train.steps = 2000
    config.train.ema_decay = 0.998
    config.train.sample_every = 0
    config.train.masks = ConfigDict({"objects": 0.5, "boxes": 0.2, "strokes": 0.2, "whole": 0.1})
    config.train.data.num_scenes = 16_384
    config.train.data.cache = "train/tiny/inpainting_latents"
    config.train.optimizer.learning_rate = 3e-3
    config.train.optimizer.final_learning_rate = 3e-5
    return config
