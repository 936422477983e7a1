# SPDX-License-Identifier: Apache-2.0
"""What the tasks share: `Task`, its first weights, its frozen components and its result.

A batch is a dict of arrays, batch first. Which of them it has depends on the task and the cache:

    images uint8 (b, h, w, 3)           or  latents (b, h/8, w/8, 4)
    input_ids (b, n)                    or  embeds (b, n, d_model)
    attention_mask bool (b, n)              with either
    masks float32 (b, h, w) with images, or, for inpainting,
    mask (b, h/8, w/8, 1) and masked_latents (b, h/8, w/8, 4) with latents
    weight float32 (b,)                 optional, of each sample
"""

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from k3jax.checkpoints.format import Checkpoint
from k3jax.checkpoints.restore import restore
from k3jax.config import COMPONENTS, ModelConfig
from k3jax.model.abstract import abstract_module
from k3jax.sharding import TRAINING_RULES
from k3jax.training.data.training_data import TrainingData
from k3jax.training.random_weights import random_weights
from k3jax.training.result import save_checkpoint
from k3jax.training.state import Weights, weight_shardings, weights_of
from k3jax.training.train_config import TrainConfig


Batch = Mapping[str, jax.Array]
Modules = Mapping[str, nnx.Module]


class Task(ABC):
    """What a run trains: data, first weights, loss, pictures and result.

    Attributes:
        name: value of `train.task`.
        config: settings of the run; `components` are those that the task trains.
        model: architecture of the result.
        base: checkpoint of the components that do not start from scratch, or None.
        trained: abstract modules of the trained components, in the dtype of the computation.
        frozen: names of the components that the loss reads and does not train.
        fixed: prefixes of the names of trained components' weights that do not change.
    """

    name: ClassVar[str]
    frozen: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()

    def __init__(
        self, config: TrainConfig, model: ModelConfig, base: Checkpoint | None, mesh: Mesh
    ):
        self.config, self.model, self.base, self.mesh = config, model, base, mesh
        self.trained = {name: self.abstract(name) for name in self.trained_components()}

    @classmethod
    def components(cls, config: TrainConfig) -> tuple[str, ...]:
        """Names of the components that the task trains.

        Raises:
            ValueError: settings that do not apply to the task.
        """
        if config.decoder_only:
            raise ValueError(
                "train.decoder_only continues training the decoder of a checkpoint's autoencoder: "
                "it needs train.task movq, and train.from_scratch false."
            )
        return config.components

    @abstractmethod
    def loss(
        self, weights: Weights, frozen: Modules, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(scalar loss, metrics) of a batch."""

    @abstractmethod
    def open_data(self, tokenizer: Path | None, progress: bool) -> TrainingData:
        """The batches of the run; fills the cache of latents and embeddings if there is one."""

    def sampler(
        self, batch: Mapping[str, np.ndarray], tokenizer: Path | None
    ) -> Callable[[Weights], np.ndarray] | None:
        """A function from weights to a grid of pictures, uint8 (h, w, 3); None: no pictures.

        Args:
            batch: on the host; its first images are shown.
        """
        return None

    def needed_components(self) -> list[str]:
        """Names of the components that the base must have, for the run or its result."""
        return [] if self.config.from_scratch else list(self.config.components)

    def check(self) -> None:
        """Checks the base and the settings.

        Raises:
            ValueError: the base lacks a component, or there is no base.
        """
        base = self.base
        missing = [
            name
            for name in self.needed_components()
            if base is None or name not in base.component_paths
        ]
        if missing:
            where = "there is no checkpoint" if base is None else f"{base.path} does not have it"
            raise ValueError(
                f"this run needs the {', '.join(missing)} of a checkpoint, and {where}: give "
                "--checkpoint DIR, or set train.from_scratch."
            )

    def trained_components(self) -> tuple[str, ...]:
        """Names of the components whose own weights are trained."""
        return self.config.components

    def abstract(self, name: str) -> nnx.Module:
        """A component of the result without weights, in the dtype of the computation."""
        module = abstract_module(name, self.model, "float32", self.config.dtype)
        if name == "unet":
            module.remat = self.config.remat
        return module

    @functools.cached_property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the trained weights, which are float32."""
        return structs(weights_of(self.trained))

    @functools.cached_property
    def shardings(self) -> dict[str, NamedSharding]:
        """Shardings of the trained weights."""
        return weight_shardings(self.trained, self.mesh)

    def first_weights(self) -> Weights:
        """The weights at step 0: random, or those of the base in float32."""
        return weights_of({name: self.first_module(name) for name in self.trained})

    def first_module(self, name: str) -> nnx.Module:
        """A trained component at step 0."""
        if self.config.from_scratch:
            return random_weights(name, self.model, self.config.seed)
        kwargs = dict(mesh=self.mesh, param_dtype="float32", rules=TRAINING_RULES)
        return restore(self.base, name, **kwargs)

    def frozen_modules(self) -> dict[str, nnx.Module]:
        """The frozen components, from the base, on the mesh."""
        return {name: self.frozen_module(name) for name in self.frozen}

    def frozen_module(self, name: str, dtype: str | None = None) -> nnx.Module:
        """A component of the base.

        Args:
            dtype: of the computation; that of frozen weights by default.
        """
        stored = self.config.frozen_dtype
        kwargs = dict(mesh=self.mesh, param_dtype=stored, dtype=dtype or stored)
        module = restore(self.base, name, **kwargs)
        if name == "unet":
            module.remat = self.config.remat
        return module

    def tokenizer(self, folder: Path, new: bool) -> Path | None:
        """The folder of the tokenizer.

        Args:
            folder: of the run.
            new: whether the run has no checkpoint yet.
        """
        return None if self.base is None else self.base.path / "tokenizer"

    def save_result(
        self, folder: Path, weights: Weights, tokenizer: Path | None, steps: int
    ) -> Path:
        """Writes the result into the run's folder; returns the result's own folder."""
        source: dict[str, Any] = {"layout": "k3jax train", "task": self.name, "steps": steps}
        if self.base is not None:
            source["base"] = {"fingerprint": self.base.fingerprint, "source": self.base.source}
        trained = [name for name in self.trained if name in COMPONENTS]
        return save_checkpoint(folder, self.model, weights, trained, self.base, tokenizer, source)


def architecture(
    config: TrainConfig, model: ModelConfig | None, base: Checkpoint | None
) -> ModelConfig:
    """The base's own, except for components from scratch, which are as the config's `model` says.

    Args:
        config: its `components` are those that the task trains.
        model: of the config.
    """
    if base is None or model is None:
        return model if base is None else base.config
    if not config.from_scratch or config.lora is not None:
        return base.config
    scratch = {name: getattr(model, name) for name in config.components}
    return dataclasses.replace(base.config, **scratch)


def structs(weights: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of weights, in float32."""
    return {name: jax.ShapeDtypeStruct(value.shape, np.float32) for name, value in weights.items()}
