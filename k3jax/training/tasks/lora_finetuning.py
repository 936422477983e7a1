# SPDX-License-Identifier: Apache-2.0
"""The tasks with `train.lora`: low-rank updates of a U-Net's attention; all components are frozen.

How a LoRA works is in `k3jax.model.adapters`. A loss for `jax.grad` over the LoRA's weights alone:

    def loss(weights, unet, batch):
        return objective(adapters.apply(unet, weights, adapters.update_factor(config)), batch)
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from k3jax.config import LoraConfig
from k3jax.model import adapters
from k3jax.training.result import save_lora_result
from k3jax.training.state import Weights
from k3jax.training.tasks.denoising import Denoising
from k3jax.training.tasks.inpainting import Inpainting
from k3jax.training.tasks.task import structs


class LoraDenoising(Denoising):
    """Trains the factors A and B of each linear layer; their names are "NAME.a" and "NAME.b"."""

    def __init__(self, config, model, base, mesh):
        super().__init__(config, model, base, mesh)
        unet = self.abstract("unet")
        self._first = init_lora(unet, config.lora, config.seed)
        self.shapes = structs(flattened(self._first))
        self.shardings = flattened(adapters.lora_shardings(unet, self._first, mesh))

    def trained_components(self) -> tuple[str, ...]:
        return ()

    def first_weights(self) -> Weights:
        return flattened(self._first)

    def modules(self, weights, frozen):
        factor = adapters.update_factor(self.config.lora)
        return {**frozen, "unet": adapters.apply(frozen["unet"], nested(weights), factor)}

    def frozen_modules(self) -> dict[str, nnx.Module]:
        return {name: self.frozen_module(name, self.config.dtype) for name in self.frozen}

    def save_result(self, folder: Path, weights, tokenizer, steps) -> Path:
        return save_lora_result(folder, nested(weights), self.config.lora, self.base.fingerprint)


class LoraInpainting(LoraDenoising, Inpainting):
    """The same for a U-Net of 9 input channels."""

    def check(self) -> None:
        if self.base is not None and self.base.config.unet != self.model.unet:
            raise ValueError(
                f"{self.base.path} is not an inpainting checkpoint: train a LoRA for inpainting on "
                "one."
            )
        super().check()


def init_lora(
    unet: nnx.Module, config: LoraConfig, seed: int = 0
) -> dict[str, dict[str, np.ndarray]]:
    """A normal with variance 1 / in, B zero: a U-Net with it computes what it does without.

    Args:
        unet: with or without weights.

    Returns:
        float32 on the host; `k3jax.model.adapters.lora_shardings` says where it goes on a mesh.

    Raises:
        ValueError: a rank or alpha that is not positive, or a target that is no linear layer.
    """
    if config.rank < 1:
        raise ValueError(f"the LoRA's rank is {config.rank}; it must be 1 or more.")
    if config.alpha is not None and not config.alpha > 0:
        raise ValueError(f"the LoRA's alpha is {config.alpha}; it must be more than 0.")
    rng = np.random.default_rng(seed)
    return {
        name: {
            "a": rng.standard_normal((rows, config.rank), np.float32) * np.float32(rows**-0.5),
            "b": np.zeros((config.rank, columns), np.float32),
        }
        for name, (rows, columns) in sorted(adapters.target_shapes(unet, config).items())
    }


def nested(weights: Weights) -> dict[str, dict[str, jax.Array]]:
    """{"x.y.a": ..., "x.y.b": ...} -> {"x.y": {"a": ..., "b": ...}}: see `model.adapters`."""
    layers: dict[str, dict[str, jax.Array]] = {}
    for name, value in weights.items():
        layer, _, part = name.rpartition(".")
        layers.setdefault(layer, {})[part] = value
    return layers


def flattened(layers: Mapping[str, Mapping[str, jax.Array]]) -> Weights:
    """The inverse of `nested`."""
    return {f"{name}.{part}": value for name, ab in layers.items() for part, value in ab.items()}
