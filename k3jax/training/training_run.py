# SPDX-License-Identifier: Apache-2.0
"""One training run, or the stages of a recipe one after the other.

config, checkpoint -> task -> data -> state -> loop -> result
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from k3jax.checkpoints.format import read_checkpoint
from k3jax.config import ModelConfig, to_dict
from k3jax.pipelines.compilation_cache import enable_compilation_cache
from k3jax.pipelines.programs import computing
from k3jax.sharding import data_parallelism, make_mesh
from k3jax.training.loop import put_batch, run_loop
from k3jax.training.loss_plot import plot_losses
from k3jax.training.metrics import METRICS, MetricWriter, read_metrics
from k3jax.training.optimizer import learning_rate, make_optimizer
from k3jax.training.run_checkpoints import RunCheckpoints
from k3jax.training.run_folder import RunFolder
from k3jax.training.signals import Stop, stop_requested
from k3jax.training.state import (
    TrainState,
    abstract_state,
    final_weights,
    new_state,
    state_shardings,
)
from k3jax.training.step import make_step
from k3jax.training.tasks import make_task
from k3jax.training.tasks.task import Task
from k3jax.training.train_config import TrainConfig, checked
from k3jax.training.training_speed import StepTimer, flops_of


@dataclass(frozen=True)
class TrainingRun:
    """One training run: its settings, and what it starts from.

    Attributes:
        checkpoint: folder of the weights to start from.
        model: the architecture, where no checkpoint has it.
        mesh: devices; see `k3jax.sharding.make_mesh`.
    """

    train: TrainConfig
    checkpoint: str | None = None
    model: ModelConfig | None = None
    mesh: str = "data=-1"


def train(run: TrainingRun, progress: bool = False) -> Path | None:
    """Starts or resumes a run; returns the folder of the result.

    None: a signal ended the run before its last step; the same call resumes it.

    Raises:
        ValueError: one sentence, before anything is trained: a config, checkpoint or data set that
            cannot be used.
    """
    return train_stages({"": run}, progress)


def train_stages(runs: Mapping[str, TrainingRun], progress: bool = False) -> Path | None:
    """Runs the stages of a recipe, one after the other, as `train` does.

    Args:
        runs: name of a stage -> its run.
    """
    enable_compilation_cache()
    result = None
    with stop_requested() as stop:
        for number, (name, run) in enumerate(runs.items(), start=1):
            if len(runs) > 1 and jax.process_index() == 0:
                print(f"stage {number} of {len(runs)}: {name} ({run.train.output})")
            result = _train(run, stop, progress)
            if result is None:
                break
    return result


def _train(run: TrainingRun, stop: Stop, progress: bool) -> Path | None:
    config = checked(run.train)
    folder = RunFolder(config.output)
    base = None if run.checkpoint is None else read_checkpoint(run.checkpoint)
    if base is None and run.model is None:
        raise ValueError("train needs a checkpoint (--checkpoint DIR) or a config with a `model`.")
    mesh = make_mesh(run.mesh)
    _check_batch(config, data_parallelism(mesh))
    task = make_task(config, run.model, base, mesh)
    task.check()
    description = {
        "train": to_dict(task.config),
        "model": to_dict(task.model),
        "base": None if base is None else base.fingerprint,
    }
    folder.check(description)
    if (result := folder.finished(config.steps)) is not None:
        if jax.process_index() == 0:
            print(f"{folder.path} is finished: it has all {config.steps} steps.")
        return result
    with folder.lock():
        folder.check(description)  # again: another process may have changed it meanwhile
        tokenizer = task.tokenizer(folder.path, new=not folder.started())
        state = _run_steps(task, folder, description, tokenizer, stop, progress)
        _plot(folder.path)
        if int(state.step) < config.steps:
            return None
        result = task.save_result(folder.path, final_weights(state), tokenizer, config.steps)
        folder.record_result(config.steps, result)
    return result


def _run_steps(
    task: Task,
    folder: RunFolder,
    description: Mapping[str, Any],
    tokenizer: Path | None,
    stop: Stop,
    progress: bool,
) -> TrainState:
    """Runs the remaining steps, from the newest checkpoint if there is one."""
    config, mesh = task.config, task.mesh
    optimizer = make_optimizer(config.optimizer, config.steps, task.fixed)
    shardings = state_shardings(
        task.shapes, task.shardings, optimizer, mesh, config.ema_decay is not None
    )
    with contextlib.ExitStack() as stack:
        data = task.open_data(tokenizer, progress)
        stack.callback(data.batches.close)
        checkpoints = stack.enter_context(RunCheckpoints(folder.path, config.checkpoint))
        writer = stack.enter_context(MetricWriter(folder.path))
        stack.enter_context(computing(mesh, config.dtype))
        if checkpoints.latest_step() is None:
            state, position = new_state(task.first_weights(), optimizer, shardings), {}
        else:
            abstract = abstract_state(task.shapes, optimizer, shardings)
            state, position = checkpoints.restore_newest(abstract)
            data.batches.restore(position["data"])
        frozen = task.frozen_modules()
        step = make_step(task.loss, optimizer, config)
        first = data.batches.batch(0)
        flops = _model_flops(task, frozen, first)
        sample = None if not config.sample_every else task.sampler(first, tokenizer)
        folder.record(description)
        writer.resume(int(state.step))
        return run_loop(
            config,
            mesh,
            jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)),
            state,
            frozen,
            data.batches,
            checkpoints,
            writer,
            stop,
            position=position,
            learning_rate=learning_rate(config.optimizer, config.steps),
            timer=StepTimer(config.batch_size, flops, mesh.devices.flat),
            validate=_validation(task, frozen, data.validation),
            sample=sample and (lambda state: sample(final_weights(state))),
        )


def _plot(folder: Path) -> None:
    """Draws the losses of the run, if it has any."""
    metrics = folder / METRICS
    if jax.process_index() == 0 and metrics.exists():
        if any(record.get("loss") is not None for record in read_metrics(metrics)):
            plot_losses(metrics, folder / "loss.png")


def _validation(task: Task, frozen: Any, batches: Sequence) -> Callable[[TrainState], float] | None:
    """The loss of the held-out batches with the averaged weights and the same noise."""
    if not batches:
        return None
    put = [put_batch(batch, task.mesh) for batch in batches]
    loss = jax.jit(lambda *args: task.loss(*args)[0])
    keys = jax.random.split(jax.random.key(task.config.seed + 1), len(put))

    def validate(state: TrainState) -> float:
        weights = final_weights(state)
        losses = [loss(weights, frozen, *pair) for pair in zip(put, keys, strict=True)]
        return float(np.mean(jax.device_get(losses), dtype=np.float64))

    return validate


def _model_flops(task: Task, frozen: Any, batch: Mapping[str, np.ndarray]) -> float | None:
    """FLOPs of one step: the backward pass costs twice the forward pass."""
    abstract = {
        name: jax.ShapeDtypeStruct(
            (len(x) * jax.process_count(), *x.shape[1:]), jnp.asarray(x).dtype
        )
        for name, x in batch.items()
    }
    lowered = jax.jit(task.loss).lower(task.shapes, frozen, abstract, jax.random.key(0))
    flops = flops_of(lowered)
    return None if flops is None else 3 * flops


def _check_batch(config: TrainConfig, splits: int) -> None:
    parts = config.optimizer.gradient_accumulation_steps
    if config.batch_size % (splits * parts):
        raise ValueError(
            f"train.batch_size is {config.batch_size}, but the mesh splits a batch over {splits} "
            f"devices (data x fsdp) and gradient accumulation into {parts} parts: choose a "
            f"multiple of {splits * parts}."
        )
