# SPDX-License-Identifier: Apache-2.0
"""LoRA: low-rank updates of the U-Net's attention, on a few images and one small machine.

    k3jax train --config lora --checkpoint weights/kandinsky3 --data pictures --output runs/style
    k3jax generate "a corgi" --checkpoint weights/kandinsky3 --lora runs/style/lora --lora-scale 0.8

The result is a folder of its own; `k3jax export --lora` merges it into the weights.
"""

from ml_collections import ConfigDict

from k3jax.configs.training.finetune import get_config as finetune


def get_config():
    config = finetune()
    config.train.output = "runs/lora"
    config.train.lora = ConfigDict()
    config.train.lora.rank = 16
    config.train.lora.targets = ("to_q", "to_k", "to_v", "to_out")
    config.train.steps = 2000
    config.train.batch_size = 8
    config.train.ema_decay = None
    config.train.validation_batches = 0
    config.train.data.cache = "runs/lora-cache"
    config.train.optimizer.learning_rate = 1e-4
    config.train.optimizer.warmup_steps = 100
    config.train.optimizer.weight_decay = 0.0
    return config
