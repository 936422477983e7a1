# SPDX-License-Identifier: Apache-2.0
"""What a run begins with: the model, abstract modules, the task, and the first weights."""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from k3jax.checkpoints.restore import Checkpoint, restore
from k3jax.config import ModelConfig
from k3jax.model import lora
from k3jax.model.abstract import COMPONENTS, abstract_module
from k3jax.sharding import TRAINING_RULES
from k3jax.training.random_weights import random_weights
from k3jax.training.signals import agree
from k3jax.training.state import Weights, weight_shardings, weights_of
from k3jax.training.tasks import reading as scene_text
from k3jax.training.tasks.denoising import (
    Task,
    denoising_task,
    flattened,
    lora_task,
    movq_task,
    reading_task,
)
from k3jax.training.tasks.inpainting import inpainting_config, inpainting_unet
from k3jax.training.tasks.lora_finetuning import init_lora
from k3jax.training.train_config import TrainConfig


@dataclass(frozen=True)
class Start:
    """What a run is made of, before any weights are read.

    Attributes:
        config: with what the task itself decides filled in.
        model: of the result.
        base: the checkpoint that the rest comes from, or None.
        task: what is trained, and its loss.
        shapes, placed: of the trained weights.
    """

    config: TrainConfig
    model: ModelConfig
    base: Checkpoint | None
    task: Task
    shapes: dict[str, jax.ShapeDtypeStruct]
    placed: dict[str, jax.sharding.NamedSharding]
    mesh: Mesh


def prepare(config: TrainConfig, model: ModelConfig, base: Checkpoint | None, mesh: Mesh) -> Start:
    """Puts together what can be known without data and weights.

    Args:
        model: the base's own, or that of a model from scratch.

    Raises:
        ValueError: components that the task does not train.
    """
    components = _components(config)
    config = dataclasses.replace(config, components=components)
    if config.task == "inpainting" and model.unet.in_channels == model.movq.latent_channels:
        model = inpainting_config(model)
    modules = {name: abstract_module(name, model, "float32", config.dtype) for name in COMPONENTS}
    modules["unet"].remat = config.remat
    cached = config.data.cache is not None
    if config.lora is not None:
        factor = lora.update_factor(config.lora)
        task = lora_task(config, model, modules, factor, cached=cached)
        first = init_lora(modules["unet"], config.lora, config.seed)
        shapes = _structs(flattened(first))
        placed = flattened(lora.lora_shardings(modules["unet"], first, mesh))
        return Start(config, model, base, task, shapes, placed, mesh)
    if config.task == "movq":
        task = movq_task(modules, decoder_only=config.decoder_only)
    elif config.task == "text_encoder":
        task = reading_task(modules)
    else:
        task = denoising_task(config, model, modules, cached=cached)
    shapes = _structs(weights_of(task.trained))
    return Start(config, model, base, task, shapes, weight_shardings(task.trained, mesh), mesh)


def architecture(
    config: TrainConfig, model: ModelConfig | None, base: Checkpoint | None
) -> ModelConfig:
    """The base's own; but what starts from scratch is made as the config's `model` says."""
    if base is None or model is None:
        return model if base is None else base.config
    if not config.from_scratch or config.lora is not None:
        return base.config
    own = {name: getattr(model, name) for name in _components(config)}
    return dataclasses.replace(base.config, **own)


def check_base(start: Start) -> None:
    """Checks that the base has what the run and its result need.

    Raises:
        ValueError: it lacks a component, or there is none.
    """
    config, base = start.config, start.base
    if config.lora is not None and config.task == "inpainting" and base is not None:
        if base.config.unet.in_channels != start.model.unet.in_channels:
            raise ValueError(
                f"{base.path} is no inpainting checkpoint: a LoRA for inpainting is trained on one."
            )
    scratch = config.components if config.from_scratch and config.lora is None else ()
    needed = [name for name in COMPONENTS if name not in scratch]
    if config.task in ("movq", "text_encoder"):
        needed = [] if config.from_scratch else list(config.components)
    missing = [name for name in needed if base is None or name not in base.component_paths]
    if missing:
        where = "there is no checkpoint" if base is None else f"{base.path} does not have it"
        raise ValueError(
            f"this run needs the {', '.join(missing)} of a checkpoint, and {where}: give "
            "--checkpoint DIR, or set train.from_scratch."
        )


def first_weights(start: Start) -> Weights:
    """The weights at step 0: random, or those of the base in float32.

    A U-Net of 9 input channels starts from one of 4 with the new input weights zero.
    """
    config, base = start.config, start.base
    if config.lora is not None:
        return flattened(init_lora(abstract_module("unet", start.model), config.lora, config.seed))
    modules: dict[str, nnx.Module] = {}
    for name in start.task.trained:
        if name == "reading_heads":
            width = start.model.text_encoder.d_model
            modules[name] = scene_text.ReadingHeads(width, config.seed)
        elif config.from_scratch:
            modules[name] = random_weights(name, start.model, config.seed)
        else:
            modules[name] = restore(
                base, name, mesh=start.mesh, param_dtype="float32", rules=TRAINING_RULES
            )
            if name == "unet" and base.config.unet.in_channels != start.model.unet.in_channels:
                modules[name] = inpainting_unet(modules[name], start.model)
    return weights_of(modules)


def frozen_modules(start: Start) -> dict[str, nnx.Module]:
    """The components that the loss needs and does not train, from the base, on the mesh."""
    dtype = start.config.frozen_dtype
    compute = start.config.dtype if start.config.lora is not None else dtype
    modules = {
        name: restore(start.base, name, mesh=start.mesh, param_dtype=dtype, dtype=compute)
        for name in start.task.frozen
    }
    if "unet" in modules:
        modules["unet"].remat = start.config.remat
    return modules


def result_components(start: Start) -> tuple[str, ...]:
    """The components of the result that were trained."""
    return tuple(name for name in start.task.trained if name in COMPONENTS)


def own_tokenizer(folder: Path, seed: int, anew: bool = False) -> Path:
    """The tokenizer of a text encoder from scratch, trained once in the run's folder.

    Args:
        anew: although there is one, of an earlier run that made nothing else.
    """
    path = Path(folder) / "tokenizer"
    if jax.process_index() == 0 and (anew or not (path / "tokenizer_config.json").exists()):
        part = Path(folder) / ".tokenizer.part"
        for old in (part, path):
            shutil.rmtree(old, ignore_errors=True)
        scene_text.write_tokenizer(part, scene_text.captions_to_learn(seed))
        part.rename(path)
    agree(False)  # no process reads it before it is whole
    return path


def _components(config: TrainConfig) -> tuple[str, ...]:
    if config.decoder_only and (config.task != "movq" or config.from_scratch):
        raise ValueError(
            "train.decoder_only goes on with the decoder of a checkpoint's autoencoder: it needs "
            "train.task movq, and train.from_scratch false."
        )
    if config.task in ("movq", "text_encoder"):
        return (config.task,)
    allowed = ("text_encoder", "text_projection", "unet")
    wrong = [name for name in config.components if name not in allowed]
    if wrong or "unet" not in config.components:
        raise ValueError(
            f"train.components is {config.components}, but the task {config.task} trains the unet "
            f"and may train {', '.join(allowed[:2])} with it."
        )
    if config.data.cache is not None and "text_encoder" in config.components:
        raise ValueError(
            "train.data.cache holds the embeddings of a frozen text encoder, but train.components "
            "has text_encoder: leave out one of the two."
        )
    return config.components


def _structs(weights) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(value.shape, np.float32) for name, value in weights.items()}
