# SPDX-License-Identifier: Apache-2.0
"""Kandinsky 3's U-Net from scratch, with the encoder and MoVQ of a checkpoint.

    k3jax train --config from_scratch --checkpoint weights/kandinsky3 --data 'tars/*.tar'

The original began at 256 x 256 and went up to 1024 in five stages, each from the last one's result
(--checkpoint runs/from_scratch/checkpoint --config finetune). The config `tiny`
trains every component from scratch.
"""

from k3jax.configs.training.finetune import get_config as finetune


def get_config():
    config = finetune()
    config.train.from_scratch = True
    config.train.output = "runs/from_scratch"
    config.train.steps = 600_000
    config.train.batch_size = 2048
    config.train.data.kind = "webdataset"
    config.train.data.path = "tars/*.tar"
    config.train.data.resolution = 256
    config.train.data.cache = None
    config.train.optimizer.learning_rate = 1e-4
    config.train.optimizer.warmup_steps = 10_000
    return config
