# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of the whole U-Net and the text projection on images with captions.

    k3jax train --config finetune --checkpoint weights/kandinsky3 --data pictures --output runs/mine

Text encoder and MoVQ stay frozen. With train.data.cache, latents and embeddings are computed once,
and training needs neither of the two in memory. Weights, their average and Adam's moments take
48 GB in float32: split them with a mesh (--mesh fsdp=-1), as over 32 chips of TPU v5p. Where
memory is short, --config.train.optimizer.name=adafactor needs 24 GB without the average.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.checkpoint = "weights/kandinsky3"
    config.pipeline = ConfigDict()
    config.pipeline.mesh = "fsdp=-1"

    config.train = train = ConfigDict()
    train.task = "text_to_image"
    train.components = ("text_projection", "unet")
    train.output = "runs/finetune"
    train.steps = 10_000
    train.batch_size = 64
    train.dtype = "bfloat16"
    train.remat = True
    train.ema_decay = 0.9999
    train.sample_every = 500
    train.sample_prompts = ("a corgi in a house made of sushi", "a lighthouse in a storm")
    train.validation_batches = 4

    train.data = ConfigDict()
    train.data.kind = "auto"
    train.data.path = "pictures"
    train.data.resolution = 1024
    train.data.cache = "runs/finetune-cache"

    train.loss = ConfigDict()
    train.loss.snr_gamma = 5.0
    train.loss.caption_dropout = 0.1

    train.optimizer = ConfigDict()
    train.optimizer.name = "adamw"
    train.optimizer.learning_rate = 1e-5
    train.optimizer.warmup_steps = 500
    train.optimizer.weight_decay = 0.01
    train.optimizer.max_grad_norm = 1.0
    train.optimizer.gradient_accumulation_steps = 1

    train.checkpoint = ConfigDict()
    train.checkpoint.every = 500
    train.checkpoint.keep_last = 2
    train.checkpoint.keep_best = 1
    return config
