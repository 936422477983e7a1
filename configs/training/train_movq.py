# SPDX-License-Identifier: Apache-2.0
"""MoVQ from scratch, in the released size, on crops of 256 x 256 pixels.

    k3jax train --config train_movq --data pictures --output runs/movq

Reconstruction only, with noise on the latents: neither a codebook (which Kandinsky 3 does not use)
nor the perceptual and adversarial losses of the released weights.
"""

from k3jax.configs.models.kandinsky3 import get_config as kandinsky3
from k3jax.configs.training.finetune import get_config as finetune


def get_config():
    config = finetune()
    config.checkpoint = None
    config.model = kandinsky3().model
    config.train.task = "movq"
    config.train.from_scratch = True
    config.train.output = "runs/movq"
    config.train.steps = 200_000
    config.train.batch_size = 64
    config.train.data.resolution = 256
    config.train.data.aspect_buckets = False
    config.train.data.cache = None
    config.train.optimizer.learning_rate = 1e-4
    config.train.optimizer.weight_decay = 0.0
    return config
