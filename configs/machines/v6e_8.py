# SPDX-License-Identifier: Apache-2.0
"""A host of eight TPU v6e chips (Trillium, 32 GB each).

    k3jax synthesize prompts.jsonl pictures --config v6e_8 --checkpoint weights/kandinsky3

The text encoder (17.4 GB in bfloat16) is split over all chips, 2.2 GB each. Each chip holds the
other components (6.7 GB), so denoising needs no communication.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.pipeline = ConfigDict()
    config.pipeline.mesh = "data=-1"
    config.pipeline.encoder_mesh = "tensor=-1"
    config.pipeline.dtype = "bfloat16"
    config.pipeline.param_dtype = "bfloat16"
    config.pipeline.batch_size = 8  # one per chip
    return config
