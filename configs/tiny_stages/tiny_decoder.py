# SPDX-License-Identifier: Apache-2.0
"""Third stage of `tiny`: the autoencoder's decoder, on whole pictures.

The encoder is frozen, so a U-Net trained on its latents needs no new training. Training on crops is
faster per step, but normalisation over a crop differs from that over a whole picture.

k3jax train --config tiny_decoder
"""

from k3jax.configs.tiny_stages.tiny_movq import get_config as tiny_movq


def get_config():
    config = tiny_movq()
    config.checkpoint = "train/tiny/movq/checkpoint"
    config.train.output = "train/tiny/decoder"
    config.train.from_scratch = False
    config.train.decoder_only = True
    config.train.seed = 2
    config.train.steps = 1300
    config.train.batch_size = 8
    config.train.ema_decay = 0.99
    config.train.sample_every = 650
    config.train.data.crop = None
    config.train.optimizer.name = "muon"
    config.train.optimizer.learning_rate = 1e-3
    config.train.optimizer.final_learning_rate = 1e-5
    return config
