# SPDX-License-Identifier: Apache-2.0
"""One TPU v5e chip (16 GB), as free notebooks lend it for 90 minutes.

    k3jax synthesize prompts.jsonl pictures --config v5e_1 --checkpoint weights/kandinsky3

U-Net and MoVQ take 6.6 GB in bfloat16. The text encoder would take 17.4 GB; in int8 it takes 8.7,
and is on the chip only while prompts are encoded. What a checkpoint brings along (model, sampler,
size) is not set here.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.pipeline = ConfigDict()
    config.pipeline.mesh = "data=1"
    config.pipeline.dtype = "bfloat16"
    config.pipeline.param_dtype = "bfloat16"
    config.pipeline.batch_size = 1
    config.pipeline.int8_text_encoder = True

    config.synthesize = ConfigDict()
    config.synthesize.phases = "alternate"  # text encoder and U-Net do not fit together
    config.synthesize.samples_per_shard = 50  # minutes of work, that a disconnect may cost
    return config
