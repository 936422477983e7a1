# SPDX-License-Identifier: Apache-2.0
"""A host of eight TPU v5e chips (v5e-8: 2x4, 16 GB each), as Kaggle lends it.

    k3jax synthesize prompts.jsonl pictures --config v5e_8 --checkpoint weights/kandinsky3

All weights take 24.1 GB in bfloat16: split over four chips they leave 10 GB of each for
activations, and stay there, so that nothing is loaded twice.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.pipeline = ConfigDict()
    config.pipeline.mesh = "data=-1,fsdp=4"
    config.pipeline.dtype = "bfloat16"
    config.pipeline.param_dtype = "bfloat16"
    config.pipeline.batch_size = 8  # one per chip
    return config
