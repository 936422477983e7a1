# SPDX-License-Identifier: Apache-2.0
"""One TPU v5e chip (16 GB), as in free notebooks, for 90 minutes.

    k3jax synthesize prompts.jsonl pictures --config v5e_1 --checkpoint weights/kandinsky3

U-Net and MoVQ take 6.6 GB in bfloat16. The text encoder would take 17.4 GB. In int8 it takes
8.7 GB, and it is on the chip only while prompts are encoded.
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
    config.synthesize.samples_per_shard = 50  # a disconnect loses minutes of work
    return config
