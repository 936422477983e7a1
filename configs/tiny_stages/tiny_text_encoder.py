# SPDX-License-Identifier: Apache-2.0
"""First stage of `tiny`: its tokenizer and its text encoder.

k3jax train --config tiny_text_encoder
"""

from ml_collections import ConfigDict

from k3jax.configs.models.tiny import get_config as tiny


def get_config():
    config = tiny()
    config.train = train = ConfigDict()
    train.task = "text_encoder"
    train.output = "train/tiny/text_encoder"
    train.from_scratch = True
    train.seed = 3
    train.steps = 800
    train.batch_size = 128
    train.dtype = "float32"
    train.ema_decay = None
    train.validation_batches = 6
    train.optimizer = ConfigDict()
    train.optimizer.learning_rate = 2e-3
    train.optimizer.schedule = "cosine"
    train.optimizer.final_learning_rate = 2e-5
    train.optimizer.warmup_steps = 200
    train.optimizer.b2 = 0.99
    return config
