# SPDX-License-Identifier: Apache-2.0
"""The optimiser of a config, from parts of optax."""

import optax
from optax.contrib import MuonDimensionNumbers, muon

from k3jax.training.train_config import OptimizerConfig


NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)
"""The quintic of Muon's iteration (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""

ENDS = {"conv_in", "conv_out", "time_embedding", "reading_heads"}
"""Layers at the ends of a network: not for Muon, since their inputs or outputs are no features."""

LORA_FACTORS = ("a", "b")


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


def make_optimizer(
    config: OptimizerConfig, steps: int, fixed: tuple[str, ...] = ()
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW, Adafactor or Muon, at the rate of `learning_rate`.

    Args:
        fixed: prefixes of the names of weights that do not change.

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
        # No momentum, and only a row and a column of the second moments: little memory.
        rule = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(config.weight_decay, mask=decayed),
            optax.scale_by_learning_rate(rate),
        )
    elif config.name == "muon":
        direction = muon(
            1.0,
            # One entry per iteration compiles to a loop: a tenth of the operations.
            ns_coeffs=(NEWTON_SCHULZ,) * 5,
            muon_weight_dimension_numbers=matrices,
            consistent_rms=0.2,
            adam_b1=config.b1,
            adam_b2=config.b2,
        )
        # optax's own decay omits the weights that Adam updates, such as embeddings.
        rule = optax.chain(
            direction,
            optax.scale(-1.0),
            optax.add_decayed_weights(config.weight_decay, mask=decayed),
            optax.scale_by_learning_rate(rate),
        )
    else:
        rule = optax.adamw(
            rate,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decayed,
        )
    parts = [rule]
    if config.max_grad_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.max_grad_norm))
    if fixed:  # weight decay also changes weights without a gradient
        parts.append(
            optax.masked(
                optax.set_to_zero(),
                lambda weights: {name: name.startswith(fixed) for name in weights},
            )
        )
    return parts[0] if len(parts) == 1 else optax.chain(*parts)


def _is_kernel(name: str) -> bool:
    """Of a linear layer, (in, out), or a convolution, (h, w, in, out); stacked or not."""
    parts = name.split(".")
    return parts[-1] == "kernel" or parts[-2:-1] == ["kernels"]


def matrices(weights):
    """The axes along which Muon orthogonalises a weight; None: Adam updates it.

    A convolution (h, w, in, out) is the matrix of its patches. Stacked layers have a leading axis,
    and each layer is a matrix. Adam updates both ends and LoRA's factors: orthogonal factors would
    have full rank from the start.
    """

    def one(name, weight):
        ndim = getattr(weight, "ndim", 0)  # optax masks some of them
        if not _is_kernel(name) or ENDS.intersection(name.split(".")) or ndim < 2:
            return None
        layers = ndim % 2
        return MuonDimensionNumbers(tuple(range(layers, ndim - 1)), ndim - 1)

    return {name: one(name, weight) for name, weight in weights.items()}


def decayed(weights):
    """Kernels, token embeddings and LoRA's factors.

    Not biases (the relative position bias is a table of them), norm scales, the null embedding, nor
    MoVQ's codebook, which has no gradient.
    """

    def one(name):
        parts = name.split(".")
        return _is_kernel(name) or "embed_tokens" in parts or parts[-1] in LORA_FACTORS

    return {name: one(name) for name in weights}
