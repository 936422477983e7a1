# SPDX-License-Identifier: Apache-2.0
"""The training step compiled ahead of time for devices that are not there.

XLA:TPU runs on any machine with `libtpu` installed; it refuses what does not fit, and tells how
much memory what fits takes.
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
from k3jax.training.tasks.task import prepare
from k3jax.training.train_config import TrainConfig


@dataclass(frozen=True)
class StepMemory:
    """Bytes on each device.

    Attributes:
        state: weights, average, moments and the batch, as they lie between steps.
        temporaries: what the step needs besides, gradients and activations included.
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
    start = prepare(config, model, None, mesh)
    optimizer = make_optimizer(config.optimizer, config.steps, start.task.fixed)
    where = state_shardings(
        start.shapes, start.placed, optimizer, mesh, config.ema_decay is not None
    )
    step = make_step(
        start.task.loss,
        optimizer,
        seed=config.seed,
        ema_decay=config.ema_decay,
        gradient_accumulation_steps=config.optimizer.gradient_accumulation_steps,
    )
    frozen = {name: _placed_module(name, config, model, mesh) for name in start.task.frozen}
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
    state = abstract_state(start.shapes, optimizer, where)
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(where, None))
    with computing(mesh, config.dtype):
        return compiled.lower(state, frozen, batch)


def step_memory(compiled: jax.stages.Compiled) -> StepMemory:
    """What the compiler says of a compiled step."""
    analysis = compiled.memory_analysis()
    # The new state takes the place of the old one, which is donated.
    return StepMemory(
        analysis.argument_size_in_bytes,
        analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
    )


def _placed_module(name: str, config: TrainConfig, model: ModelConfig, mesh: Mesh) -> nnx.Module:
    """A frozen component as structs that know where they lie."""
    module = abstract_module(name, model, config.frozen_dtype, config.dtype)
    if name == "unet":
        module.remat = config.remat
    return placed(module, mesh)
