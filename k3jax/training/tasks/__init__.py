# SPDX-License-Identifier: Apache-2.0
"""The tasks of training: a file with a `Task` each, and a row in `TASKS`."""

import dataclasses

from jax.sharding import Mesh

from k3jax.checkpoints.format import Checkpoint
from k3jax.config import ModelConfig
from k3jax.training.data.open_source import with_kind
from k3jax.training.tasks.autoencoder import Autoencoder
from k3jax.training.tasks.caption_reading import CaptionReading
from k3jax.training.tasks.denoising import Denoising
from k3jax.training.tasks.inpainting import Inpainting
from k3jax.training.tasks.lora_finetuning import LoraDenoising, LoraInpainting
from k3jax.training.tasks.task import Task, architecture
from k3jax.training.train_config import TrainConfig


TASKS = {task.name: task for task in (Denoising, Inpainting, Autoencoder, CaptionReading)}
LORA_TASKS = {task.name: task for task in (LoraDenoising, LoraInpainting)}
"""Value of `train.task` -> task, without and with `train.lora`."""


def make_task(
    config: TrainConfig, model: ModelConfig | None, base: Checkpoint | None, mesh: Mesh
) -> Task:
    """The task of a run; reads neither data nor weights.

    Args:
        model: architecture of what starts from scratch; None: the base's.

    Raises:
        ValueError: an unknown task, or settings that do not apply to it.
    """
    table = TASKS if config.lora is None else LORA_TASKS
    if config.task not in table:
        lora = "" if config.lora is None else " with train.lora"
        raise ValueError(
            f"train.task is {config.task!r}; it must be one of {', '.join(table)}{lora}."
        )
    task = table[config.task]
    components, data = task.components(config), with_kind(config.data)
    config = dataclasses.replace(config, components=components, data=data)
    return task(config, architecture(config, model, base), base, mesh)
