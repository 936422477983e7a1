# SPDX-License-Identifier: Apache-2.0
"""Fourth stage of `tiny`: the U-Net goes on with errors at high noise weighing more.

The stage before learns colours, shapes and backgrounds, which show at every noise level; where
things lie is decided at high noise only, and is learned here.

k3jax train --config tiny_layout
"""

from k3jax.configs.tiny_unet import get_config as tiny_unet


def get_config():
    config = tiny_unet()
    config.checkpoint = "train/tiny/unet/checkpoint"
    config.train.output = "train/tiny/layout"
    config.train.from_scratch = False
    config.train.steps = 1500
    config.train.sample_every = 500
    config.train.loss.layout_weight = 30.0
    config.train.optimizer.learning_rate = 4e-3
    config.train.optimizer.final_learning_rate = 4e-5
    return config
