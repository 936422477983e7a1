# SPDX-License-Identifier: Apache-2.0
"""One training run, or the stages of a recipe one after the other.

config, checkpoint -> start -> data -> state -> loop -> result
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from k3jax.checkpoints.format import read_checkpoint
from k3jax.cli.run_config import RunConfig, build, collect
from k3jax.config import to_dict
from k3jax.model.tokenizer import Tokenizer
from k3jax.pipelines.compilation_cache import enable_compilation_cache
from k3jax.pipelines.programs import computing
from k3jax.sharding import data_parallelism, make_mesh
from k3jax.training import sample_grids as samples
from k3jax.training.data.inpainting_masks import check_masks
from k3jax.training.data.open_source import open_source
from k3jax.training.data.precompute import index_of, open_cache
from k3jax.training.data.training_data import (
    SceneReading,
    WithPrior,
    make_cached_loader,
    make_loader,
    prior_config,
    split_validation,
)
from k3jax.training.denoising_loss import check_loss
from k3jax.training.loop import put_batch, run_loop
from k3jax.training.loss_plot import plot_losses
from k3jax.training.metrics import METRICS, MetricWriter, read_metrics
from k3jax.training.optimizer import learning_rate, make_optimizer
from k3jax.training.result import final_weights, save_result
from k3jax.training.run_checkpoints import RunCheckpoints
from k3jax.training.run_folder import RunFolder
from k3jax.training.signals import Stop, stop_requested
from k3jax.training.state import (
    TrainState,
    abstract_state,
    new_state,
    state_shardings,
)
from k3jax.training.step import make_step
from k3jax.training.tasks.task import (
    Start,
    architecture,
    check_base,
    first_weights,
    frozen_modules,
    own_tokenizer,
    prepare,
)
from k3jax.training.throughput import flops_of
from k3jax.training.timing import StepTimer
from k3jax.training.train_config import TrainConfig, checked


def train(run: RunConfig, progress: bool = False) -> Path | None:
    """Trains what the config says, or goes on with it; returns the folder of the result.

    None: a signal ended the run before its last step; the same call goes on from there.

    Raises:
        ValueError: one sentence, before anything is trained: a config, checkpoint or data set that
            cannot be used.
    """
    enable_compilation_cache()
    runs = [run] if not run.train.stages else [_stage(name) for name in run.train.stages]
    result = None
    with stop_requested() as stop:
        for number, stage in enumerate(runs):
            if len(runs) > 1 and jax.process_index() == 0:
                name = run.train.stages[number]
                print(f"stage {number + 1} of {len(runs)}: {name} ({stage.train.output})")
            result = _train(stage, stop, progress)
            if result is None:
                break
    return result


def _stage(name: str) -> RunConfig:
    return build(collect(name))


def _train(run: RunConfig, stop: Stop, progress: bool) -> Path | None:
    config = checked(run.train)
    folder = RunFolder(config.output)
    base = None if run.checkpoint is None else read_checkpoint(run.checkpoint)
    if base is None and run.model is None:
        raise ValueError("train needs a checkpoint (--checkpoint DIR) or a config with a `model`.")
    mesh = make_mesh(run.pipeline.mesh)
    _check_batch(config, data_parallelism(mesh))
    check_masks(config.masks, config.data)
    start = prepare(config, architecture(config, run.model, base), base, mesh)
    check_base(start)
    config = start.config
    if config.task in ("text_to_image", "inpainting"):
        check_loss(config.loss, start.model.sampler)
    description = _description(start)
    folder.check(description)
    if (result := folder.finished(config.steps)) is not None:
        if jax.process_index() == 0:
            print(f"{folder.path} has made its {config.steps} steps: there is nothing left to do.")
        return result
    tokenizer_folder = base.path / "tokenizer" if base is not None else None
    with folder.lock():
        folder.check(description)  # again, for what another process did meanwhile
        if config.task == "text_encoder":
            tokenizer_folder = own_tokenizer(folder.path, config.seed, anew=not folder.started())
        state = _steps(start, folder, description, tokenizer_folder, stop, progress)
        _plot(folder.path)
        if int(state.step) < config.steps:
            return None
        source = {"layout": "k3jax train", "task": config.task, "steps": config.steps}
        if base is not None:
            source["base"] = {"fingerprint": base.fingerprint, "source": base.source}
        result = save_result(start, folder.path, final_weights(state), tokenizer_folder, source)
        folder.record_result(config.steps, result)
    return result


def _steps(
    start: Start,
    folder: RunFolder,
    description: Mapping[str, Any],
    tokenizer_folder: Path | None,
    stop: Stop,
    progress: bool,
) -> TrainState:
    """Makes the steps that are left, from the newest checkpoint if there is one."""
    config, mesh = start.config, start.mesh
    optimizer = make_optimizer(config.optimizer, config.steps, start.task.fixed)
    placed = state_shardings(
        start.shapes, start.placed, optimizer, mesh, config.ema_decay is not None
    )
    with contextlib.ExitStack() as stack:
        data = open_data(start, tokenizer_folder, progress)
        stack.callback(data.batches.close)
        checkpoints = stack.enter_context(RunCheckpoints(folder.path, config.checkpoint))
        writer = stack.enter_context(MetricWriter(folder.path))
        stack.enter_context(computing(mesh, config.dtype))
        if checkpoints.latest_step() is None:
            state, position = new_state(first_weights(start), optimizer, placed), {}
        else:
            abstract = abstract_state(start.shapes, optimizer, placed)
            state, position = checkpoints.restore_newest(abstract)
            data.batches.restore(position["data"])
        frozen = frozen_modules(start)
        step = make_step(
            start.task.loss,
            optimizer,
            seed=config.seed,
            ema_decay=config.ema_decay,
            gradient_accumulation_steps=config.optimizer.gradient_accumulation_steps,
        )
        first = data.batches.batch(0)
        timer = StepTimer(config.batch_size, _model_flops(start, frozen, first), mesh.devices.flat)
        validate = _validation(start, frozen, data.validation)
        sample = _sampling(start, first, tokenizer_folder, writer)
        folder.record(description)
        writer.resume(int(state.step))
        return run_loop(
            config,
            mesh,
            jax.jit(step, donate_argnums=0, out_shardings=(placed, None)),
            state,
            frozen,
            data.batches,
            checkpoints,
            writer,
            stop,
            position=position,
            learning_rate=learning_rate(config.optimizer, config.steps),
            timer=timer,
            validate=validate,
            sample=sample,
        )


def _plot(folder: Path) -> None:
    """Draws the losses of the run, as far as its metrics are there."""
    metrics = folder / METRICS
    if jax.process_index() == 0 and metrics.exists():
        if any(record.get("loss") is not None for record in read_metrics(metrics)):
            plot_losses(metrics, folder / "loss.png")


@dataclasses.dataclass(frozen=True)
class _Data:
    """Attributes:
    batches: what is trained on.
    validation: batches that are not, always the same ones.
    """

    batches: Any
    validation: list[dict[str, np.ndarray]]


def open_data(start: Start, tokenizer_folder: Path | None, progress: bool) -> _Data:
    """The batches of a run; latents and embeddings are computed here if they are to be cached."""
    config = start.config
    if config.task == "text_encoder":
        tokenizer = Tokenizer(tokenizer_folder)
        held_out = SceneReading(tokenizer, config.batch_size, config.seed, "test")
        validation = [held_out.batch(number) for number in range(config.validation_batches)]
        return _Data(SceneReading(tokenizer, config.batch_size, config.seed), validation)
    tokenizer = None if config.task == "movq" else Tokenizer(tokenizer_folder)
    source = open_source(config.data, seed=config.seed)
    if config.data.crop is not None:
        data = dataclasses.replace(config.data, resolution=config.data.crop)
        config = dataclasses.replace(config, data=data)
    index = index_of(source, config.data)
    used, held_out = split_validation(len(source), config)
    size = config.batch_size
    if config.data.cache is not None and config.task != "movq":
        cache = open_cache(config, start.base, source, index, tokenizer, progress)
        batches = make_cached_loader(config, cache, size, used)
        kept = make_cached_loader(config, cache, size, held_out) if len(held_out) else None
    elif config.prior is not None:
        prior = prior_config(config)
        count = round(size * prior.prior.share)
        if not 0 < count < size:
            raise ValueError(
                f"train.prior.share is {prior.prior.share}, which leaves {size - count} of "
                f"{size} samples to the subject: both need at least one."
            )
        classes = open_source(prior.data)
        batches = WithPrior(
            make_loader(config, source, index, tokenizer, size - count, used),
            make_loader(prior, classes, index_of(classes, prior.data), tokenizer, count),
            prior.prior.weight,
        )
        kept = None
    else:
        batches = make_loader(config, source, index, tokenizer, size, used)
        kept = (
            make_loader(config, source, index, tokenizer, size, held_out) if len(held_out) else None
        )
    return _Data(batches, [kept.batch(n) for n in range(config.validation_batches)] if kept else [])


def _validation(start: Start, frozen, batches) -> Callable[[TrainState], float] | None:
    """The loss of the held-out batches with the averaged weights; same noise every time."""
    if not batches:
        return None
    put = [put_batch(batch, start.mesh) for batch in batches]
    loss = jax.jit(lambda *args: start.task.loss(*args)[0])
    keys = jax.random.split(jax.random.key(start.config.seed + 1), len(put))

    def validate(state: TrainState) -> float:
        weights = final_weights(state)
        losses = [loss(weights, frozen, *pair) for pair in zip(put, keys, strict=True)]
        return float(np.mean(jax.device_get(losses), dtype=np.float64))

    return validate


def _sampling(start: Start, batch, tokenizer_folder, writer: MetricWriter):
    """What shows the state as a grid of pictures, or None."""
    config = start.config
    if not config.sample_every or config.task == "text_encoder":
        return None
    return samples.SampleGrids(start, batch, tokenizer_folder, writer).show


def _model_flops(start: Start, frozen, batch) -> float | None:
    """Of one step: a backward pass costs twice the forward one."""
    abstract = {
        name: jax.ShapeDtypeStruct(
            (len(x) * jax.process_count(), *x.shape[1:]), jnp.asarray(x).dtype
        )
        for name, x in batch.items()
    }
    lowered = jax.jit(start.task.loss).lower(start.shapes, frozen, abstract, jax.random.key(0))
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


def _description(start: Start) -> dict[str, Any]:
    base = None if start.base is None else start.base.fingerprint
    return {"train": to_dict(start.config), "model": to_dict(start.model), "base": base}
