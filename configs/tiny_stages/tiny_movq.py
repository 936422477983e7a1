# SPDX-License-Identifier: Apache-2.0
"""Second stage of `tiny`: its autoencoder, on crops of 64 x 64 pixels.

k3jax train --config tiny_movq
"""

from ml_collections import ConfigDict

from k3jax.configs.models.tiny import get_config as tiny


def get_config():
    config = tiny()
    config.checkpoint = "train/tiny/text_encoder/checkpoint"
    config.train = train = ConfigDict()
    train.task = "movq"
    train.output = "train/tiny/movq"
    train.from_scratch = True
    train.seed = 1
    train.steps = 1600
    train.batch_size = 16
    train.dtype = "float32"
    train.ema_decay = 0.998
    train.data = ConfigDict()
    train.data.kind = "scenes"
    train.data.resolution = 128
    train.data.crop = 64
    train.data.aspect_buckets = False
    train.optimizer = ConfigDict()
    train.optimizer.learning_rate = 2e-3
    train.optimizer.schedule = "cosine"
    train.optimizer.final_learning_rate = 4e-5
    train.optimizer.warmup_steps = 100
    train.optimizer.b2 = 0.99
    train.optimizer.weight_decay = 0.0
    return config
