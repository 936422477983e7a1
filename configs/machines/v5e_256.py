# SPDX-License-Identifier: Apache-2.0
"""A slice of 256 TPU v5e chips: 64 hosts of four chips; each host writes its own shards.

    k3jax synthesize gs://b/prompts.parquet gs://b/pictures --config v5e_256 \\
        --checkpoint gs://b/kandinsky3

The command is the same on every host and reads the host's number from the environment. Hosts never
wait for each other, so the mesh covers one host. Training uses one mesh over all chips:
`k3jax train --config finetune --mesh fsdp=-1`.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.pipeline = ConfigDict()
    config.pipeline.mesh = "data=-1,fsdp=4"  # of the four chips of a host
    config.pipeline.dtype = "bfloat16"
    config.pipeline.param_dtype = "bfloat16"
    config.pipeline.batch_size = 4  # one per chip
    return config
