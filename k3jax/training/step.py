# SPDX-License-Identifier: Apache-2.0
"""The compiled training step: loss, gradients, update, moving average.

    step(state, frozen, batch) -> (state, metrics)

Everything random in step k comes from fold_in(key(seed), k): the same on any mesh, and after a
restart.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from k3jax.model.layers import with_fast_cpu_gradients
from k3jax.training.state import TrainState, Weights
from k3jax.training.train_config import TrainConfig


# (trained weights, frozen modules, batch, key) -> (loss, metrics)
Loss = Callable[[Weights, Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def make_step(
    loss: Loss, optimizer: optax.GradientTransformation, config: TrainConfig
) -> Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """The step as a function to be jitted with its first argument donated.

    With gradient accumulation the parts of a batch are computed one after the other, with the
    memory of one part. Each part has every n-th sample, so that a batch that is split over devices
    is not moved.
    """
    parts, ema_decay = config.optimizer.gradient_accumulation_steps, config.ema_decay
    gradient = jax.value_and_grad(with_fast_cpu_gradients(loss), has_aux=True)

    def accumulated(weights, frozen, batch, key):
        if parts == 1:
            return gradient(weights, frozen, batch, key)

        def cut(x):
            return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)

        def add(total, inputs):
            number, part = inputs
            result = gradient(weights, frozen, part, jax.random.fold_in(key, number))
            return jax.tree.map(lambda t, m: t + m / parts, total, result), None

        cuts = (jnp.arange(parts), jax.tree.map(cut, batch))
        one = jax.tree.map(lambda x: x[0], cuts[1])
        shapes = jax.eval_shape(gradient, weights, frozen, one, key)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(add, zeros, cuts)[0]

    def step(state: TrainState, frozen: Any, batch: Any):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        (value, metrics), grads = accumulated(state.weights, frozen, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.weights)
        weights = optax.apply_updates(state.weights, updates)
        ema = state.ema
        if ema is not None:
            # A low decay at first, or the average would keep too much of the random start.
            count = state.step.astype(jnp.float32)
            decay = jnp.minimum(ema_decay, (1 + count) / (10 + count))
            # In this form weights that do not change are exactly the same in the average.
            ema = jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), ema, weights)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads), **metrics}
        return TrainState(state.step + 1, weights, ema, opt_state), metrics

    return step
