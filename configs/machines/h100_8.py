# SPDX-License-Identifier: Apache-2.0
"""A machine of eight H100 GPUs (80 GB each).

    k3jax synthesize prompts.jsonl pictures --config h100_8 --checkpoint weights/kandinsky3

Each GPU holds all weights (24.1 GB in bfloat16), so the GPUs do not communicate.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.pipeline = ConfigDict()
    config.pipeline.mesh = "data=-1"
    config.pipeline.dtype = "bfloat16"
    config.pipeline.param_dtype = "bfloat16"
    config.pipeline.batch_size = 32  # four per GPU
    return config
