# SPDX-License-Identifier: Apache-2.0
"""The state of a training run: weights, their moving average, the optimiser's state.

Weights are a flat dict "unet.conv_in.kernel" -> array, a form that optax, Orbax and LoRA share.
`with_weights` turns it into a module. Everything is sharded by `k3jax.sharding.TRAINING_RULES`:
split over `fsdp` and `tensor`, copied over `data`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from k3jax.sharding import TRAINING_RULES, shardings


Weights = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The state of a run after some steps.

    Attributes:
        step: int32 scalar, number of updates.
        weights: float32, the trained weights.
        ema: their exponential moving average, or None.
        opt_state: of the optimiser.
    """

    step: jax.Array
    weights: Weights
    ema: Weights | None
    opt_state: optax.OptState


def final_weights(state: TrainState) -> Weights:
    """The moving average, or the weights themselves if there is none."""
    return state.weights if state.ema is None else state.ema


def weights_of(modules: Mapping[str, nnx.Module]) -> Weights:
    """The weights of named modules as one flat dict."""
    return {
        f"{component}.{_dotted(path)}": variable.get_value()
        for component, module in modules.items()
        for path, variable in nnx.to_flat_state(nnx.state(module))
    }


def with_weights(module: nnx.Module, component: str, weights: Mapping[str, jax.Array]):
    """A copy of a (possibly abstract) module with these weights."""
    graph, state = nnx.split(module)
    flat = [
        (path, variable.replace(weights[f"{component}.{_dotted(path)}"]))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def weight_shardings(modules: Mapping[str, nnx.Module], mesh: Mesh) -> dict[str, NamedSharding]:
    """The sharding of each weight of `weights_of`."""
    return {
        f"{component}.{_dotted(path)}": variable.get_value()
        for component, module in modules.items()
        for path, variable in nnx.to_flat_state(shardings(module, mesh, TRAINING_RULES))
    }


def state_shardings(
    weights: Mapping[str, jax.ShapeDtypeStruct],
    placed: Mapping[str, NamedSharding],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    ema: bool,
) -> TrainState:
    """A TrainState of shardings: the optimiser's moments are sharded as their weights.

    Moments of another shape than their weight (Adafactor's rows and columns) are small and copied.
    """
    copied = NamedSharding(mesh, PartitionSpec())
    weights, placed = dict(weights), dict(placed)

    def sharding(path, leaf):
        name = getattr(path[-1], "key", None) if path else None  # moments are dicts like `weights`
        return placed[name] if name in weights and leaf.shape == weights[name].shape else copied

    opt_state = jax.tree_util.tree_map_with_path(sharding, jax.eval_shape(optimizer.init, weights))
    return TrainState(copied, placed, placed if ema else None, opt_state)


def new_state(
    weights: Weights, optimizer: optax.GradientTransformation, placed: TrainState
) -> TrainState:
    """The state at step 0, with the shardings `placed`. Donates the weights."""

    def make(weights):
        ema = None if placed.ema is None else jax.tree.map(jnp.copy, weights)
        return TrainState(jnp.zeros((), jnp.int32), weights, ema, optimizer.init(weights))

    weights = jax.device_put(weights, placed.weights)
    return jax.jit(make, out_shardings=placed, donate_argnums=0)(weights)


def abstract_state(
    weights: Mapping[str, jax.ShapeDtypeStruct],
    optimizer: optax.GradientTransformation,
    placed: TrainState,
) -> TrainState:
    """The state as ShapeDtypeStructs with shardings, to restore a checkpoint into."""
    weights = dict(weights)
    shapes = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32),
        weights,
        None if placed.ema is None else weights,
        jax.eval_shape(optimizer.init, weights),
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        placed,
    )


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))
