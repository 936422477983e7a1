# SPDX-License-Identifier: Apache-2.0
"""A host of eight TPU v6e chips (Trillium, 32 GB each).

    k3jax synthesize prompts.jsonl pictures --config v6e_8 --checkpoint weights/kandinsky3

In bfloat16 the text encoder takes 17.4 GB, which are split over all chips (2.2 GB each); of the
other components (6.7 GB) each chip has its own, so that it denoises without a word to the others.
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
