# SPDX-License-Identifier: Apache-2.0
"""The memory of a training step, from compiling it for devices that need not exist.

XLA:TPU runs on any machine with `libtpu` installed. It refuses a program that does not fit, and
reports the memory of one that fits.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from k3jax.config import ModelConfig
from k3jax.model.abstract import abstract_module
from k3jax.pipelines.programs import computing
from k3jax.sharding import batch_sharding, placed
from k3jax.training.optimizer import make_optimizer
from k3jax.training.state import abstract_state, state_shardings
from k3jax.training.step import make_step
from k3jax.training.tasks import make_task
from k3jax.training.train_config import TrainConfig


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step on each device.

    Attributes:
        state: weights, average, moments and the batch, between steps.
        temporaries: the additional memory during a step, for gradients and activations.
    """

    state: int
    temporaries: int

    @property
    def total(self) -> int:
        return self.state + self.temporaries


def lower_step(
    config: TrainConfig, model: ModelConfig, mesh: Mesh, *, size: int, tokens: int = 128
) -> jax.stages.Lowered:
    """The step of a run on cached latents, traced for a mesh whose devices need not exist.

    Args:
        size: side of the images in pixels.
        tokens: rows of the text embeddings.
    """
    task = make_task(config, model, None, mesh)
    optimizer = make_optimizer(config.optimizer, config.steps, task.fixed)
    where = state_shardings(
        task.shapes, task.shardings, optimizer, mesh, config.ema_decay is not None
    )
    step = make_step(task.loss, optimizer, config)
    frozen = {name: _placed_module(name, config, model, mesh) for name in task.frozen}
    b, side, split = config.batch_size, size // model.movq.scale_factor, batch_sharding(mesh)
    shapes = {
        "latents": ((b, side, side, model.movq.latent_channels), jnp.float16),
        "embeds": ((b, tokens, model.text_encoder.d_model), jnp.float16),
        "attention_mask": ((b, tokens), jnp.bool_),
    }
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=split)
        for name, (shape, dtype) in shapes.items()
    }
    state = abstract_state(task.shapes, optimizer, where)
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(where, None))
    with computing(mesh, config.dtype):
        return compiled.lower(state, frozen, batch)


def step_memory(compiled: jax.stages.Compiled) -> StepMemory:
    """The compiler's report on a compiled step."""
    analysis = compiled.memory_analysis()
    # The new state reuses the memory of the old one, which is donated.
    return StepMemory(
        analysis.argument_size_in_bytes,
        analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
    )


def _placed_module(name: str, config: TrainConfig, model: ModelConfig, mesh: Mesh) -> nnx.Module:
    """A frozen component of ShapeDtypeStructs with shardings."""
    module = abstract_module(name, model, config.frozen_dtype, config.dtype)
    if name == "unet":
        module.remat = config.remat
    return placed(module, mesh)
