# SPDX-License-Identifier: Apache-2.0
"""Our checkpoint -> PyTorch's files, streamed leaf by leaf, bit for bit."""

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from k3jax.checkpoints.cards import model_card
from k3jax.checkpoints.format import Checkpoint, as_path, read_checkpoint
from k3jax.checkpoints.manifest import CARD, check_component
from k3jax.checkpoints.new_folder import disk_errors, new_folder
from k3jax.checkpoints.restore import iterate_leaves, leaf_shapes
from k3jax.convert import keys
from k3jax.convert.architecture import own_settings, settings_file
from k3jax.convert.arrays import as_torch_view
from k3jax.convert.diffusers_json import (
    CODEBOOK_ROWS,
    model_index_json,
    movq_json,
    scheduler_json,
    text_encoder_json,
    unet_json,
)
from k3jax.convert.layouts import VARIANTS
from k3jax.convert.rules import ConversionError, raise_faults, to_torch_array
from k3jax.convert.safetensors_writer import Entry, SafetensorsWriter, nbytes, shards, write_index
from k3jax.convert.tensors import open_safetensors
from k3jax.files import is_local


SHARD_BYTES = 5_000_000_000
NULL, BIAS, CODEBOOK = "null_embedding", "norm.bias", "codebook.embedding"


def export(
    checkpoint: str | Path,
    destination: str | Path,
    layout: str = "diffusers",
    *,
    variant: str | None = None,
    progress: bool = True,
) -> None:
    """Writes a checkpoint of ours as PyTorch's files.

    `diffusers`: a folder that `Kandinsky3Pipeline.from_pretrained` loads. `original`: the files of
    Kandinsky 3.1, or of 3.0 if the weights came from there. In the layout from which they came, all
    tensors are bit for bit as they were. Across layouts the weights are exact, but the two code
    bases condition differently, so their pictures differ; a warning explains how.

    Args:
        checkpoint: folder or bucket path.
        destination: a folder that does not exist.
        layout: `diffusers` or `original`.
        variant: `base`, `flash` or `inpainting`, for the names of the original files; by default
            what the checkpoint was converted from.

    Raises:
        ConversionError: the model cannot be written in this layout, or the destination exists.
        k3jax.files.CheckpointError: the checkpoint is damaged, or the destination cannot be
            written.
    """
    if layout not in ("diffusers", "original"):
        raise ConversionError(f"layout is {layout!r}; it must be 'diffusers' or 'original'.")
    checkpoint = read_checkpoint(checkpoint)
    if layout == "original" and checkpoint.source.get("layout") == "original30":
        layout = "original30"
    variant = variant or checkpoint.source.get("variant", "base")
    if variant not in VARIANTS:
        raise ConversionError(f"variant is {variant!r}; it must be one of {list(VARIANTS)}.")
    jsons = _jsons(checkpoint, layout, VARIANTS[variant])
    for component, folder in checkpoint.component_paths.items():
        check_component(folder.parent, component, hashed=is_local(folder))
    path = as_path(destination)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConversionError(f"{path} exists already: choose another destination.")
    with new_folder(path) as folder, disk_errors(path):
        folder = Path(folder)
        parts = {c: _Part(checkpoint, c, layout) for c in checkpoint.component_paths}
        total = sum(nbytes(e) for part in parts.values() for e in part.entries.values())
        with tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
            if layout == "diffusers":
                _write_diffusers(folder, parts, bar)
                tokenizer = folder / "tokenizer"
            else:
                _write_original(folder, parts, VARIANTS[variant], layout, bar)
                tokenizer = folder / "flan_ul2_encoder"
        for name, values in jsons.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(values, indent=2) + "\n")
        for file in (checkpoint.path / "tokenizer").iterdir():
            tokenizer.mkdir(parents=True, exist_ok=True)
            (tokenizer / file.name).write_bytes(file.read_bytes())
        family = "diffusers" if layout == "diffusers" else "original"
        card = model_card(
            checkpoint.config, checkpoint.source, checkpoint.dtype, checkpoint.fingerprint, family
        )
        (folder / CARD).write_text(card, encoding="utf-8")
    _warn(checkpoint, layout)


class _Part:
    """One component in a layout: its tensors' names, dtypes and shapes, and the tensors in turn."""

    def __init__(self, checkpoint: Checkpoint, component: str, layout: str):
        self.component = component
        self._checkpoint = checkpoint
        dialect = "diffusers" if layout == "diffusers" else "original"
        levels = len(checkpoint.config.movq.block_out_channels)
        table = keys.table(component, dialect, levels=levels)
        structs = leaf_shapes(checkpoint, component)
        shapes = {name: struct.shape for name, struct in structs.items()}
        if component == "text_projection" and layout == "diffusers":
            shapes.pop(NULL, None)
        if component == "movq" and layout != "diffusers":
            shapes.pop(CODEBOOK, None)
        plan = table.to_torch(shapes)
        raise_faults(plan.faults, str(checkpoint.path))
        self._steps = {step.jax_name: step for step in plan.steps}
        self.entries: dict[str, Entry] = {
            s.torch_name: (np.dtype(structs[s.jax_name].dtype), s.torch_shape) for s in plan.steps
        }
        self._added = {}
        if component == "text_projection" and layout != "diffusers" and NULL not in shapes:
            self._added[NULL] = (NULL, BIAS)
            self.entries[NULL] = (np.dtype(structs[BIAS].dtype), structs[BIAS].shape)
        self._codebook = component == "movq" and layout == "diffusers" and CODEBOOK not in shapes
        if self._codebook:
            ((_, self._codebook_name),) = table.from_jax(CODEBOOK)
            dtype = np.dtype(structs["quant_conv.kernel"].dtype)
            width = checkpoint.config.movq.vq_embed_dim
            self.entries[self._codebook_name] = (dtype, (CODEBOOK_ROWS, width))

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """(PyTorch's name, array), each tensor once."""
        for name, array in iterate_leaves(self._checkpoint, self.component):
            if name == BIAS and NULL in self._added:
                yield NULL, array
            if name in self._steps:
                step = self._steps[name]
                yield step.torch_name, to_torch_array(step.rule, array)
        if self._codebook:
            dtype, shape = self.entries[self._codebook_name]
            yield self._codebook_name, np.zeros(shape, dtype)


def _jsons(checkpoint: Checkpoint, layout: str, end: str) -> dict[str, dict]:
    """File -> its content. Refuses what the layout cannot represent."""
    encoder = text_encoder_json(checkpoint.config.text_encoder, checkpoint.dtype)
    own = {settings_file(layout, end): own_settings(checkpoint.config, layout)}
    if layout != "diffusers":
        return {"flan_ul2_encoder/config.json": encoder, **own}
    return {
        **own,
        "model_index.json": model_index_json(_tokenizer_class(checkpoint)),
        "unet/config.json": unet_json(checkpoint.config),
        "movq/config.json": movq_json(checkpoint.config.movq),
        "text_encoder/config.json": encoder,
        "scheduler/scheduler_config.json": scheduler_json(checkpoint.config.sampler),
    }


def _tokenizer_class(checkpoint: Checkpoint) -> str:
    """T5Tokenizer only reads T5's kind of vocabulary; small models may bring another."""
    file = checkpoint.path / "tokenizer" / "tokenizer_config.json"
    name = json.loads(file.read_text()).get("tokenizer_class") if file.exists() else None
    return name if name == "PreTrainedTokenizerFast" else "T5Tokenizer"


def _write_diffusers(folder: Path, parts: Mapping[str, _Part], bar) -> None:
    stem = "diffusion_pytorch_model"
    _write(folder / "unet", stem, [parts["unet"], parts["text_projection"]], None, bar)
    _write(folder / "movq", stem, [parts["movq"]], None, bar)
    files = _write(folder / "text_encoder", "model", [parts["text_encoder"]], SHARD_BYTES, bar)
    if len(files) > 1:
        write_index(files, folder / "text_encoder" / "model.safetensors.index.json")


def _write_original(folder: Path, parts: Mapping[str, _Part], end: str, layout: str, bar) -> None:
    """torch.save needs whole state dicts: saved from a memory map of files written before."""
    encoder, work = folder / "flan_ul2_encoder", folder / "work"
    encoder.mkdir(parents=True)

    def state(component):
        ((file, _),) = _write(work, component, [parts[component]], None, bar).items()
        return _mapped(work / file)

    projection = state("text_projection")
    content = {"unet": state("unet"), NULL: projection.pop(NULL)}
    if layout == "original30":
        content["projections"] = {f"t5.{name}": tensor for name, tensor in projection.items()}
    else:
        _save(projection, encoder / f"projection{end}.pt")
    _save(content, folder / f"kandinsky3{end}.pt")
    shutil.rmtree(work)
    _save(state("movq"), folder / "movq.pt")
    files = _write(work, "pytorch_model", [parts["text_encoder"]], 2 * SHARD_BYTES, bar)
    bins = {file.replace(".safetensors", ".bin"): entries for file, entries in files.items()}
    for file, bin_file in zip(files, bins, strict=True):
        _save(_mapped(work / file), encoder / bin_file)
        (work / file).unlink()
    if len(bins) > 1:
        write_index(bins, encoder / "pytorch_model.bin.index.json")
    shutil.rmtree(work)


def _save(content: Mapping, file: Path) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:  # what PyTorch makes of a failed write
        raise ConversionError(
            f"{file} cannot be written (is the disk full?): {str(error).splitlines()[0]}"
        ) from error


def _mapped(file: Path) -> dict[str, torch.Tensor]:
    return {name: as_torch_view(tensor.read()) for name, tensor in open_safetensors(file).items()}


def _write(folder: Path, stem: str, parts, limit: int | None, bar) -> dict[str, dict[str, Entry]]:
    """Writes parts into one file, or into shards. Returns file name -> its tensors."""
    entries = {name: entry for part in parts for name, entry in part.entries.items()}
    files = shards(entries, limit or sum(map(nbytes, entries.values())), stem, "safetensors")
    writers = {file: SafetensorsWriter(folder / file, part) for file, part in files.items()}
    place = {name: writers[file] for file, part in files.items() for name in part}
    for part in parts:
        bar.set_description(part.component)
        for name, array in part.tensors():
            place[name].write(name, array)
            bar.update(array.nbytes)
    for writer in writers.values():
        writer.close()
    return files


def _warn(checkpoint: Checkpoint, layout: str) -> None:
    conditioning = checkpoint.config.conditioning
    if layout == "diffusers" and conditioning == "original":
        warnings.warn(
            "The weights are exact, but diffusers conditions them in its own way (padding before "
            "the projection, zero embeddings instead of the null embedding, which is dropped), so "
            "its pictures differ from those of the original code and of k3jax.",
            stacklevel=3,
        )
    if layout == "diffusers" and checkpoint.config.sampler.name == "flash":
        warnings.warn("diffusers has no sampler for Flash: its pictures will not do.", stacklevel=3)
    if layout != "diffusers" and conditioning == "diffusers":
        warnings.warn(
            "The null embedding of the original layout is set to the bias of the projection's "
            "norm, which makes the unconditional branch what it is in diffusers; rows of padding "
            "are zero in the original code and that bias in diffusers, so pictures differ. The "
            "codebook, which no decoder uses, has no place in this layout.",
            stacklevel=3,
        )
