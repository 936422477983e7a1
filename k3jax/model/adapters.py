# SPDX-License-Identifier: Apache-2.0
"""Adapters: what changes a U-Net's layers from outside, while the base's weights stay as they are.

They are LoRAs (arXiv:2106.09685): low-rank updates x W + (x A) B of linear layers. The weights of
an adapter are a tree of their own, apart from the U-Net's:

    {"down_blocks.1.self_attention.attention.to_q": {"a": (in, rank), "b": (rank, out)}, ...}

Several at once are one of the summed rank (`combine`). `k3jax.checkpoints.lora_files` reads and
writes them, `k3jax.pipelines.adapters` gives them names and strengths.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from k3jax.config import LoraConfig
from k3jax.files import CheckpointError
from k3jax.sharding import RULES, axes, gathered, shardings, split_as_columns


Weights = Mapping[str, Mapping[str, Any]]
"""Dotted name of a linear layer -> {"a": (in, rank), "b": (rank, out)}."""


class LoraLinear(nnx.Module):
    """x W + (x A) B, never W + A B: the base's weights stay as they are, and where they are."""

    def __init__(self, base: nnx.Linear, a: jax.Array, b: jax.Array):
        metadata = base.kernel.get_metadata()
        name_in, name_out = metadata.get("out_sharding") or (None, None)
        heads = metadata.get("heads")
        self.base = base
        self.a = nnx.LoRAParam(a, **axes(name_in, None, heads=heads))
        self.b = nnx.LoRAParam(b, **axes(None, name_out, heads=heads))

    def __call__(self, x: jax.Array) -> jax.Array:
        dtype, precision = self.base.dtype, self.base.precision
        low = jnp.matmul(x.astype(dtype), gathered(self.a, dtype), precision=precision)
        low = split_as_columns(low, self.a)
        update = jnp.matmul(low, gathered(self.b, dtype), precision=precision)
        return self.base(x) + split_as_columns(update, self.b)


def update_factor(config: LoraConfig, scale: float = 1.0) -> float:
    """What A B is multiplied by: scale alpha / rank.

    Raises:
        ValueError: a scale that is no number.
    """
    if not math.isfinite(scale):
        raise ValueError(
            f"the LoRA's scale is {scale}; it must be a finite number, usually 0 to 1."
        )
    alpha = config.rank if config.alpha is None else config.alpha
    return scale * alpha / config.rank


def apply(unet: nnx.Module, weights: Weights, factor: float | jax.Array = 1.0) -> nnx.Module:
    """The U-Net with x W + factor (x A) B in the layers that `weights` names; `unet` is unchanged.

    Works inside and outside of compiled functions, and under `jax.grad` with respect to `weights`.
    The factor goes into B, so that the result for another factor is the same program.

    Raises:
        CheckpointError: `weights` is of another architecture.
    """
    check_fits(weights, unet)
    unet = _copy(unet)
    for name, (parent, attribute) in _places(unet).items():
        if name in weights:
            a, b = (jnp.asarray(weights[name][key]) for key in "ab")
            layer = LoraLinear(getattr(parent, attribute), a, b * factor)
            setattr(parent, attribute, layer)
    return unet


def combine(parts: Sequence[tuple[Weights, float | jax.Array]]) -> Weights:
    """One adapter that does what several do, each times its factor.

    x A1 B1 f1 + x A2 B2 f2 is x A B, with the columns of both A and the rows of both f B. So the
    factors are values, and other factors are the same program.
    """
    names = dict.fromkeys(name for weights, _ in parts for name in weights)
    combined = {}
    for name in names:
        layers = [(weights[name], factor) for weights, factor in parts if name in weights]
        combined[name] = {
            "a": jnp.concatenate([layer["a"] for layer, _ in layers], axis=1),
            "b": jnp.concatenate([layer["b"] * factor for layer, factor in layers], axis=0),
        }
    return combined


def merge(unet: nnx.Module, weights: Weights, factor: float | jax.Array = 1.0) -> nnx.Module:
    """The U-Net with kernels W + factor A B, summed in float32; `unet` is unchanged.

    Raises:
        CheckpointError: `weights` is of another architecture.
    """
    check_fits(weights, unet)
    unet = _copy(unet)
    for name, (parent, attribute) in _places(unet).items():
        if name in weights:
            kernel = getattr(parent, attribute).kernel
            value = kernel.get_value()
            a, b = (jnp.asarray(weights[name][key], jnp.float32) for key in "ab")
            update = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST) * factor
            kernel.set_value((value.astype(jnp.float32) + update).astype(value.dtype))
    return unet


def target_shapes(unet: nnx.Module, config: LoraConfig) -> dict[str, tuple[int, int]]:
    """Name -> (in, out) of the linear layers that a LoRA's targets name, in the U-Net's order.

    Args:
        unet: with or without weights.

    Raises:
        ValueError: a target that is the name of no linear layer.
    """
    layers = _layer_shapes(unet)
    known = sorted({name.split(".")[-1] for name in layers})
    missing = [target for target in config.targets if target not in known]
    if missing or not config.targets:
        raise ValueError(
            f"The U-Net has no linear layer called {', '.join(missing) or 'nothing'} "
            f"(LoRA targets): choose from {', '.join(known)}."
        )
    return {n: shape for n, shape in layers.items() if n.split(".")[-1] in config.targets}


def lora_shardings(
    unet: nnx.Module, weights: Weights, mesh: Mesh, rules=RULES
) -> dict[str, dict[str, NamedSharding]]:
    """Where a LoRA's weights go: A is split as the rows of W are, B as its columns."""
    check_fits(weights, unet)
    places = _places(unet)
    layers = nnx.List(
        LoraLinear(getattr(*places[name]), pair["a"], pair["b"]) for name, pair in weights.items()
    )
    state = shardings(layers, mesh, rules)
    return {
        name: {key: state[number][key].get_value() for key in "ab"}
        for number, name in enumerate(weights)
    }


def check_fits(
    weights: Weights, unet: nnx.Module, config: LoraConfig | None = None, where: str = "The LoRA"
) -> None:
    """Refuses weights of layers that the U-Net does not have.

    Args:
        unet: with or without weights.
        config: if given, all layers that its targets name must be in `weights`.

    Raises:
        CheckpointError: one sentence with the names.
    """
    layers = _layer_shapes(unet)
    targets = set(weights) if config is None else set(target_shapes(unet, config))
    misshapen = []
    for name in sorted(weights.keys() & layers.keys()):
        a, b = weights[name]["a"].shape, weights[name]["b"].shape
        if (a[0], b[-1]) != layers[name] or a[-1] != b[0]:
            misshapen.append(f"{name} ({a} x {b} for a kernel of {layers[name]})")
    unknown = weights.keys() - layers.keys() if config is None else weights.keys() - targets
    faults = {
        "unknown": sorted(unknown),
        "missing": sorted(targets - weights.keys()),
        "of another shape": misshapen,
    }
    parts = [f"{len(names)} {what}: {_some(names)}" for what, names in faults.items() if names]
    if parts:
        raise CheckpointError(
            f"{where} is for another architecture than this U-Net's; {'; '.join(parts)}."
        )


def _copy(unet: nnx.Module) -> nnx.Module:
    """New modules and variables with the same arrays."""
    return jax.tree.map(lambda leaf: leaf, unet)


def _places(unet: nnx.Module) -> dict[str, tuple[nnx.Module, str]]:
    """Dotted name of each linear layer -> the module that has it, and the attribute."""
    modules = dict(nnx.iter_modules(unet))
    return {
        ".".join(map(str, path)): (modules[path[:-1]], path[-1])
        for path, module in modules.items()
        if isinstance(module, nnx.Linear)
    }


def _layer_shapes(unet: nnx.Module) -> dict[str, tuple[int, int]]:
    return {
        name: getattr(parent, attribute).kernel.shape
        for name, (parent, attribute) in _places(unet).items()
    }


def _some(names: list[str], limit: int = 4) -> str:
    more = [f"{len(names) - limit} more"] if len(names) > limit else []
    return ", ".join([*names[:limit], *more])
