# SPDX-License-Identifier: Apache-2.0
"""The loop: batches -> steps -> metrics, checkpoints, pictures; until the last step or a signal.

A killed run repeats exactly the steps after its last checkpoint: the state and the position in the
data are saved together, and everything random depends on the number of the step only.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from k3jax.sharding import batch_sharding
from k3jax.training.data.training_data import Batches
from k3jax.training.metrics import MetricWriter
from k3jax.training.run_checkpoints import RunCheckpoints
from k3jax.training.signals import Stop, agree
from k3jax.training.state import TrainState
from k3jax.training.train_config import TrainConfig
from k3jax.training.training_speed import StepTimer


SMOOTHING = 0.99
"""Decay, per log line, of the average training loss that replaces a missing validation loss."""


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch, as arrays split over the mesh along the batch."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(value))
        for name, value in batch.items()
    }


def run_loop(
    config: TrainConfig,
    mesh: Mesh,
    step: Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    frozen: Any,
    batches: Batches,
    checkpoints: RunCheckpoints,
    writer: MetricWriter,
    stop: Stop,
    *,
    position: Mapping[str, Any],
    learning_rate: optax.Schedule,
    timer: StepTimer,
    validate: Callable[[TrainState], float] | None = None,
    sample: Callable[[TrainState], np.ndarray] | None = None,
) -> TrainState:
    """Trains up to `config.steps`, or until `stop` is set; saves a checkpoint at the end.

    Args:
        step: jitted; donates its first argument.
        position: of the checkpoint that `state` is from; empty at the start.
        validate: state -> loss of held-out data; decides which checkpoints are the best.
        sample: state -> a grid of pictures.

    Raises:
        ValueError: the loss is not finite; that state is not saved.
    """
    done = int(state.step)
    smoothed = position.get("smoothed_loss")
    waiting: list[dict[str, jax.Array]] = []
    while done < config.steps:
        state, metrics = step(state, frozen, put_batch(next(batches), mesh))
        waiting.append(metrics)
        done += 1
        last = done == config.steps
        log = last or done % config.log_every == 0
        save = last or checkpoints.due(done)
        alone = jax.process_count() == 1
        stopping = (alone or log) and agree(stop.requested is not None)
        if log or save or stopping:
            values = _mean(waiting)
            waiting = []
            timer.mark(done)
            _check_finite(values, done, checkpoints)
            rate = float(learning_rate(done - 1))
            writer.write(done, {**values, "learning_rate": rate, **timer.metrics()})
            loss = values["loss"]
            smoothed = loss if smoothed is None else SMOOTHING * smoothed + (1 - SMOOTHING) * loss
        if save or stopping:
            with timer.pause(state):
                metric = smoothed
                if validate is not None:
                    metric = validate(state)
                    writer.write(done, {"validation_loss": metric})
                here = {"data": batches.state(), "smoothed_loss": smoothed}
                checkpoints.save(done, state, here, metric, force=True)
        if sample is not None and config.sample_every and done % config.sample_every == 0:
            with timer.pause(state):
                writer.images(done, "samples", sample(state))
        if stopping:
            break
    checkpoints.wait()
    return state


def _mean(waiting: list[dict[str, jax.Array]]) -> dict[str, float]:
    """Means since the last line, summed in a fixed order."""
    host = jax.device_get(waiting)
    return {name: float(np.mean([m[name] for m in host], dtype=np.float64)) for name in host[0]}


def _check_finite(values: Mapping[str, float], step: int, checkpoints: RunCheckpoints) -> None:
    if not math.isfinite(values["loss"]):
        latest = checkpoints.latest_step()
        kept = "there is no checkpoint" if latest is None else f"the last checkpoint is of {latest}"
        raise ValueError(
            f"the loss is {values['loss']} at step {step} ({kept}): lower "
            "train.optimizer.learning_rate, or look for faulty samples in the data."
        )
