# SPDX-License-Identifier: Apache-2.0
"""The optimiser that a config describes, made of optax's parts."""

import jax
import optax

from k3jax.training.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then constant or a cosine down to the end of the run."""
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, config.warmup_steps, steps, config.final_learning_rate
        )
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps),
            optax.constant_schedule(config.learning_rate),
        ],
        [config.warmup_steps],
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW or Adafactor, with the learning rate of `learning_rate`.

    Raises:
        ValueError: a warm-up that is longer than the run.
    """
    if config.schedule == "cosine" and config.warmup_steps >= steps:
        raise ValueError(
            f"train.optimizer.warmup_steps is {config.warmup_steps}, but the run has {steps} "
            "steps: a cosine needs steps after the warm-up."
        )
    rate = learning_rate(config, steps)
    if config.name == "adafactor":
        # No momentum, and of the second moments only a row and a column: next to no memory.
        rule = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(config.weight_decay, mask=_decayed),
            optax.scale_by_learning_rate(rate),
        )
    else:
        rule = optax.adamw(
            rate,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=_decayed,
        )
    if config.max_grad_norm is None:
        return rule
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), rule)


def _decayed(weights):
    """Kernels and embeddings, but no vectors: biases, norm scales, the null embedding."""
    return jax.tree.map(lambda w: w.ndim > 1, weights)
