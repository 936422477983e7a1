# SPDX-License-Identifier: Apache-2.0
"""A host of eight TPU v6e chips (Trillium, 32 GB each).

    k3jax synthesize prompts.jsonl pictures --config v6e_8 --checkpoint weights/kandinsky3

All weights take 24.1 GB in bfloat16, which leaves one chip too little for activations: each pair
of chips holds them once. For data sets `--mesh data=-1 --phases alternate` is the other way: no
traffic between chips, but every few shards the text encoder and the U-Net are exchanged.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.pipeline = ConfigDict()
    config.pipeline.mesh = "data=-1,fsdp=2"
    config.pipeline.dtype = "bfloat16"
    config.pipeline.param_dtype = "bfloat16"
    config.pipeline.batch_size = 8  # one per chip
    return config
