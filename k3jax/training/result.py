# SPDX-License-Identifier: Apache-2.0
"""The result of a run: a checkpoint that every command of k3jax takes, or a LoRA.

`merged_checkpoint` adds a LoRA to the weights of its base; `pack` makes a small checkpoint.
"""

import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from k3jax.checkpoints.format import Checkpoint, as_path, read_checkpoint
from k3jax.checkpoints.lora_files import load_lora, save_lora, warn_of_another_base
from k3jax.checkpoints.manifest import (
    MANIFEST,
    file_digest,
    files_below,
    read_manifest,
    write_manifest,
)
from k3jax.checkpoints.restore import iterate_leaves, leaf_shapes, save_module
from k3jax.checkpoints.writer import CheckpointWriter
from k3jax.config import COMPONENTS, LoraConfig, ModelConfig
from k3jax.model import adapters
from k3jax.model.abstract import abstract_module
from k3jax.training.state import Weights, with_weights


FOLDER = "checkpoint"
LORA_FOLDER = "lora"
"""Names of the result in the run's folder."""


def save_checkpoint(
    folder: Path,
    model: ModelConfig,
    weights: Weights,
    trained: Collection[str],
    base: Checkpoint | None,
    tokenizer: Path | None,
    source: Mapping[str, Any],
) -> Path:
    """Writes the trained components in float32; all others are shared with the base, not copied.

    An existing result is replaced once the new one is complete. Of several processes only the first
    one writes.

    Args:
        folder: of the run.
        trained: names of the trained components.
        tokenizer: its folder, or None.

    Returns:
        The folder of the checkpoint.
    """
    arrays = {name: _host(value) for name, value in weights.items()}
    path = Path(folder) / FOLDER
    if jax.process_index() != 0:
        return path
    with CheckpointWriter(path, overwrite=True) as writer:
        if tokenizer is not None:
            writer.add_tokenizer(tokenizer)
        for name in COMPONENTS:
            if name in trained:
                save_module(writer, name, with_weights(abstract_module(name, model), name, arrays))
            elif base is not None and name in base.component_paths:
                writer.share(name, base.path)
        writer.commit(model, source, "float32")
    return path


def save_lora_result(
    folder: Path, layers: Mapping[str, Mapping], config: LoraConfig, base_fingerprint: str
) -> Path:
    """Writes the LoRA of a run as `save_checkpoint` writes components; returns its folder."""
    layers = jax.tree.map(_host, dict(layers))
    path = Path(folder) / LORA_FOLDER
    if jax.process_index() == 0:
        for part in ("incomplete", "replaced"):  # of a run that was killed while it wrote them
            for left in Path(folder).glob(f"{LORA_FOLDER}.{part}-*"):
                shutil.rmtree(left)
        save_lora(path, layers, config, base_fingerprint, overwrite=True)
    return path


def merged_checkpoint(base, lora_folder, path, scale: float = 1.0, overwrite: bool = False) -> None:
    """Writes a checkpoint whose U-Net has the LoRA in its kernels, for `k3jax export`.

    Every other component is shared with the base, not copied. The sum W + A B is computed in
    float32 and rounded to the base's dtype on disk. It needs the memory of one array more than the
    writer.

    Args:
        base: the checkpoint that the LoRA was trained on; another one causes a warning.
        scale: strength of the LoRA; 1: as trained.

    Raises:
        CheckpointError: a LoRA or checkpoint that cannot be read, a LoRA of another architecture,
            or a destination that exists.
    """
    base, loaded = read_checkpoint(base), load_lora(lora_folder)
    factor = np.float32(adapters.update_factor(loaded.config, scale))
    base.component_path("unet")
    unet = abstract_module("unet", base.config)
    adapters.check_fits(loaded.weights, unet, loaded.config, where=f"The LoRA {loaded.path}")
    warn_of_another_base(loaded, base.fingerprint)
    with CheckpointWriter(path, overwrite=overwrite) as writer:
        writer.add_tokenizer(base.path / "tokenizer")
        for component in base.component_paths:
            if component != "unet":
                writer.share(component, base.path)
        for name, array in iterate_leaves(base, "unet"):
            layer, _, leaf = name.rpartition(".")
            if leaf == "kernel" and layer in loaded.weights:
                pair = loaded.weights[layer]
                update = factor * (pair["a"] @ pair["b"])
                array = (array.astype(np.float32) + update).astype(array.dtype)
            writer.write("unet", {name: array})
        settings = {"base_fingerprint": loaded.base_fingerprint, "scale": scale}
        writer.commit(base.config, {**base.source, "lora": settings}, base.dtype)


def _host(value: Any) -> np.ndarray:
    """The whole array on the host, also if other processes hold shards of it."""
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(value, tiled=True))
    return np.asarray(value)


def pack(
    source: Checkpoint, path: Path, base: Checkpoint | None = None, dtype: str = "float16"
) -> None:
    """Copies a checkpoint and the components it shares into one small folder, in another dtype.

    The weights inside the package were written by it.

    Args:
        base: a packed checkpoint; equal components are shared with it.
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
    _remove_paths(as_path(path))


def _equal(source: Checkpoint, base: Checkpoint, component: str, dtype: str) -> bool:
    pairs = zip(iterate_leaves(source, component), iterate_leaves(base, component), strict=False)
    return leaf_shapes(source, component).keys() == leaf_shapes(base, component).keys() and all(
        np.array_equal(ours.astype(dtype), theirs) for (_, ours), (_, theirs) in pairs
    )


def _remove_paths(path) -> None:
    """Removes the local paths that Orbax writes into a file, for publishing."""
    digests = read_manifest(path)["components"]
    (path / MANIFEST).unlink()
    for file in files_below(path):
        if file.name == "commit_success.txt":
            file.write_text("Checkpoint commit was successful")
    write_manifest(path, digests, file_digest, extra={})
