# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: a checkpoint that every command of k3jax takes, or a LoRA."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from k3jax.checkpoints.format import Checkpoint, as_path
from k3jax.checkpoints.lora_files import save_lora
from k3jax.checkpoints.manifest import (
    MANIFEST,
    file_digest,
    files_below,
    read_manifest,
    write_manifest,
)
from k3jax.checkpoints.restore import CheckpointWriter, iterate_leaves, leaf_shapes, save_module
from k3jax.model.abstract import COMPONENTS, abstract_module
from k3jax.training.state import TrainState, Weights, with_weights
from k3jax.training.tasks.denoising import nested
from k3jax.training.tasks.task import Start


FOLDER = "checkpoint"
LORA_FOLDER = "lora"
"""Of the result, in the run's folder."""


def final_weights(state: TrainState) -> Weights:
    """The moving average, or the weights themselves where there is none."""
    return state.weights if state.ema is None else state.ema


def save_result(
    start: Start,
    folder: Path,
    weights: Weights,
    tokenizer: Path | None,
    source: Mapping[str, Any],
) -> Path:
    """Writes the trained components in float32; all others are shared with the base, not copied.

    A result that is there already is replaced when the new one is whole. (Of several processes only
    the first one writes.)

    Args:
        folder: of the run.
        weights: what was trained.
        tokenizer: folder of the tokenizer, where there is one.

    Returns:
        The folder of the checkpoint, or of the LoRA.
    """
    whole = {name: _host(value) for name, value in weights.items()}
    if start.config.lora is not None:
        path = Path(folder) / LORA_FOLDER
        if jax.process_index() == 0:
            for part in ("incomplete", "replaced"):  # of a run that was killed at this point
                for left in Path(folder).glob(f"{LORA_FOLDER}.{part}-*"):
                    shutil.rmtree(left)
            fingerprint = start.base.fingerprint
            save_lora(path, nested(whole), start.config.lora, fingerprint, overwrite=True)
        return path
    path = Path(folder) / FOLDER
    if jax.process_index() != 0:
        return path
    model, base = start.model, start.base
    with CheckpointWriter(path, overwrite=True) as writer:
        if tokenizer is not None:
            writer.add_tokenizer(tokenizer)
        for name in COMPONENTS:
            if name in start.task.trained:
                save_module(writer, name, with_weights(abstract_module(name, model), name, whole))
            elif base is not None and name in base.component_paths:
                writer.share(name, base.path)
        writer.commit(model, source, "float32")
    return path


def _host(value: Any) -> np.ndarray:
    """The whole array on the host, also where its shards are on other processes' devices."""
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(value, tiled=True))
    return np.asarray(value)


def pack(
    source: Checkpoint, path: Path, base: Checkpoint | None = None, dtype: str = "float16"
) -> None:
    """Copies a checkpoint with all it shares into one small folder, in another dtype.

    The weights that ship inside the package are made so.

    Args:
        base: a packed checkpoint; components that are the same as its own are shared with it.
    """
    with (
        tempfile.TemporaryDirectory() as copy,
        CheckpointWriter(path, compressed=True) as writer,
    ):
        shutil.copytree(source.path / "tokenizer", copy, dirs_exist_ok=True)
        writer.add_tokenizer(copy)
        for component in source.component_paths:
            if base is not None and _equal(source, base, component, dtype):
                writer.share(component, base.path)
                continue
            for name, array in iterate_leaves(source, component):
                writer.write(component, {name: array.astype(dtype)})
        writer.commit(source.config, source.source, dtype)
    _forget_places(as_path(path))


def _equal(source: Checkpoint, base: Checkpoint, component: str, dtype: str) -> bool:
    pairs = zip(iterate_leaves(source, component), iterate_leaves(base, component), strict=False)
    return leaf_shapes(source, component).keys() == leaf_shapes(base, component).keys() and all(
        np.array_equal(ours.astype(dtype), theirs) for (_, ours), (_, theirs) in pairs
    )


def _forget_places(path) -> None:
    """Orbax notes in a file where it wrote; what is published should not tell that."""
    digests = read_manifest(path)["components"]
    (path / MANIFEST).unlink()
    for file in files_below(path):
        if file.name == "commit_success.txt":
            file.write_text("Checkpoint commit was successful")
    write_manifest(path, digests, file_digest, extra={})
