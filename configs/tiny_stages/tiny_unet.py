# SPDX-License-Identifier: Apache-2.0
"""Fifth stage of `tiny`: the U-Net at all noise levels, on latents computed once.

Errors at high noise weigh more, so that the U-Net keeps what it learned in the earlier stages.

k3jax train --config tiny_unet
"""

from ml_collections import ConfigDict

from k3jax.configs.models.tiny import get_config as tiny


def get_config():
    config = tiny()
    config.checkpoint = "train/tiny/places/checkpoint"
    config.train = train = ConfigDict()
    train.task = "text_to_image"
    train.output = "train/tiny/unet"
    train.from_scratch = False
    train.steps = 1700
    train.batch_size = 64
    train.dtype = "float32"
    train.frozen_dtype = "float32"
    train.remat = False
    train.ema_decay = 0.999
    train.sample_every = 850
    train.sample_prompts = (
        "a red circle",
        "a large blue square",
        "a striped green star",
        "three yellow circles",
        "an orange ring on a navy background",
        "a purple triangle in the top left corner",
        "a red circle and a blue square",
        "a pink star above a green cross",
        "a cyan ring left of a red triangle",
        "a dotted orange square below a blue circle",
        "two purple crosses on a beige background",
        "a yellow star right of a purple ring on a black background",
    )
    train.checkpoint = ConfigDict()
    train.checkpoint.every = 250
    train.data = ConfigDict()
    train.data.kind = "scenes"
    train.data.num_scenes = 20_480
    train.data.resolution = 128
    train.data.aspect_buckets = False
    train.data.cache = "train/tiny/latents"
    train.loss = ConfigDict()
    train.loss.layout_weight = 20.0
    train.loss.caption_dropout = 0.1
    train.optimizer = ConfigDict()
    train.optimizer.name = "muon"  # AdamW needs 270 steps where Muon needs 160
    train.optimizer.learning_rate = 4e-3
    train.optimizer.schedule = "cosine"
    train.optimizer.final_learning_rate = 4e-5
    train.optimizer.warmup_steps = 50
    train.optimizer.b2 = 0.99
    return config
