# SPDX-License-Identifier: Apache-2.0
"""What a compiler might say of a program, and the models of configs."""

from k3jax.cli.run_config import build, collect
from k3jax.config import ModelConfig
from k3jax.planning.collectives import Collective
from k3jax.planning.compiler import Compiled, Memory
from k3jax.planning.cost import Cost


def model_of(config: str) -> ModelConfig:
    return build(collect(config)).model


def compiled(
    temporaries=1e9, seconds=0.1, collectives=(), figure="schedule", arguments=7e9
) -> Compiled:
    cost = Cost(
        seconds=seconds,
        figure=figure,
        floor=seconds / 2,
        flops=1e13,
        hbm_bytes=1e10,
        scheduled=0.97,
        stalls=0.0,
        kernels=100,
        unknown_loops=0,
        collectives=tuple(Collective(*c) for c in collectives),
        kinds={"products": 0.7 * seconds, "copies": 0.1 * seconds},
    )
    memory = Memory(int(arguments), 0, int(temporaries), 0)
    return Compiled(memory, cost, 300.0, "jax 0, libtpu 0")
