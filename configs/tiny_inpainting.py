# SPDX-License-Identifier: Apache-2.0
"""Last stage of `tiny`: the U-Net with 9 input channels, from that with 4.

k3jax train --config tiny_inpainting
"""

from ml_collections import ConfigDict

from k3jax.configs.tiny import get_config as tiny


def get_config():
    config = tiny()
    config.checkpoint = "train/tiny/unet/checkpoint"
    config.train = train = ConfigDict()
    train.task = "inpainting"
    train.output = "train/tiny/inpainting"
    train.components = ("unet",)  # the text projection stays that of the base, which shares it
    train.steps = 1000
    train.batch_size = 64
    train.dtype = "float32"
    train.frozen_dtype = "float32"
    train.remat = False
    train.ema_decay = 0.998
    train.sample_every = 0
    train.checkpoint = ConfigDict()
    train.checkpoint.every = 250
    train.data = ConfigDict()
    train.data.kind = "scenes"
    train.data.num_scenes = 16_384
    train.data.resolution = 128
    train.data.aspect_buckets = False
    train.data.cache = "train/tiny/inpainting_latents"
    train.loss = ConfigDict()
    train.loss.snr_gamma = 5.0
    train.optimizer = ConfigDict()
    train.optimizer.learning_rate = 1e-3
    train.optimizer.schedule = "cosine"
    train.optimizer.final_learning_rate = 1e-5
    train.optimizer.warmup_steps = 100
    train.optimizer.b2 = 0.99
    return config
