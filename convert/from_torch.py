# SPDX-License-Identifier: Apache-2.0
"""PyTorch checkpoint -> ours, planned from the headers and streamed tensor by tensor."""

import contextlib
import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from tqdm import tqdm

from k3jax.checkpoints.digests import array_digest, combined_digest
from k3jax.checkpoints.format import TOKENIZER, Checkpoint, read_checkpoint
from k3jax.checkpoints.writer import CheckpointWriter
from k3jax.convert.arrays import bits_of, is_finite
from k3jax.convert.modules import layer_shapes, module_shapes
from k3jax.convert.rules import ConversionError, ConversionPlan, Shape, raise_faults, to_jax_array
from k3jax.convert.sources import WeightSource, open_source
from k3jax.convert.tensors import Tensors, shapes
from k3jax.convert.tokenizer_files import prepare_tokenizer
from k3jax.model.abstract import abstract_module
from k3jax.model.tokenizer import tokenizer_fault


PARAM_DTYPES = ("bfloat16", "float16", "float32")


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    variant: str = "base",
    weights_variant: str | None = None,
    text_encoder_from: str | Path | None = None,
    param_dtype: str | None = None,
    architecture: dict | None = None,
    progress: bool = True,
    overwrite: bool = False,
) -> None:
    """Converts a PyTorch checkpoint of any known layout.

    Names, shapes and dtypes are checked before anything is written. Memory: about one
    gigabyte, whatever the size; the weights pass through a memory map. A conversion that fails or
    is killed leaves nothing at `destination`, and can be run again.

    Args:
        source: folder, or Hugging Face id (`owner/name`), in the layout of diffusers or in the
            original layout of Kandinsky 3.0 or 3.1.
        destination: folder or bucket path that does not exist.
        variant: `base`, `flash` or `inpainting`.
        weights_variant: `fp16` to take the files named *.fp16.*; by default the plain ones, or the
            only ones.
        text_encoder_from: another checkpoint of ours whose text encoder is used instead of a copy.
        param_dtype: `bfloat16`, `float16` or `float32`; None keeps each tensor's own.
        architecture: see `k3jax.convert.sources.open_source`.
        overwrite: replace a checkpoint at `destination`.

    Raises:
        ConversionError: what is wrong with the source, all faults together.
        k3jax.files.CheckpointError: what is wrong with the destination.
    """
    if param_dtype not in (None, *PARAM_DTYPES):
        raise ConversionError(
            f"param_dtype is {param_dtype!r}; it must be one of {list(PARAM_DTYPES)}."
        )
    shared = None if text_encoder_from is None else read_checkpoint(text_encoder_from)
    opened = open_source(
        source,
        variant=variant,
        weights_variant=weights_variant,
        shared_text_encoder=shared.config.text_encoder if shared else None,
        architecture=architecture,
    )
    plans = plan(opened, str(source))
    with (
        _tokenizer(opened, shared) as tokenizer,
        CheckpointWriter(destination, overwrite=overwrite) as writer,
    ):
        if shared is not None:
            writer.share("text_encoder", shared.path)
        if tokenizer is not None:
            writer.add_tokenizer(tokenizer)
        digests = {}
        with tqdm(
            total=sum(t.nbytes for tensors in opened.tensors.values() for t in tensors.values()),
            unit="B",
            unit_scale=True,
            disable=not progress,
            smoothing=0.05,
        ) as bar:
            for component, steps in plans.items():
                bar.set_description(component)
                digests |= _stream(steps, opened.tensors[component], writer, param_dtype, bar)
        if tokenizer is not None:
            _check_tokenizer(writer.folder / TOKENIZER, opened)
        writer.commit(
            opened.config,
            source={
                "layout": opened.layout,
                "variant": variant,
                **opened.origin,
                "sha256": combined_digest(digests),
            },
            dtype=param_dtype or _prevailing_dtype(opened),
        )


@contextlib.contextmanager
def _tokenizer(source: WeightSource, shared: Checkpoint | None) -> Iterator[os.PathLike | None]:
    """A folder with the tokenizer, which was loaded once: that of the source, or of `shared`."""
    if source.tokenizer:
        with tempfile.TemporaryDirectory() as folder:
            vocab_size = source.config.text_encoder.vocab_size
            prepare_tokenizer(source.tokenizer, Path(folder), vocab_size)
            yield Path(folder)
    elif shared is not None:
        _check_tokenizer(shared.path / TOKENIZER, source)
        yield shared.path / TOKENIZER
    else:
        yield None


def _check_tokenizer(folder: os.PathLike, source: WeightSource) -> None:
    fault = tokenizer_fault(folder, source.config.text_encoder.vocab_size)
    if fault is not None:
        raise ConversionError(f"{fault}.")


def plan(source: WeightSource, where: str) -> dict[str, ConversionPlan]:
    """Component -> plan, for all components of the source.

    Raises:
        ConversionError: everything that names, shapes and dtypes show to be wrong, together.
    """
    plans = {}
    for component, tensors in source.tensors.items():
        table = source.tables[component]
        expected = layer_shapes(table, _module_shapes(component, getattr(source.config, component)))
        steps = plans[component] = table.to_jax(shapes(tensors), expected)
        for name, tensor in tensors.items():
            if tensor.dtype not in ("float64", "float32", "float16", "bfloat16"):
                if not table.ignores(name):
                    steps.add_fault(f"{name} has dtype {tensor.dtype}; weights are floats.")
    raise_faults([fault for steps in plans.values() for fault in steps.faults], where)
    return plans


@functools.lru_cache(16)
def _module_shapes(component: str, part: Any) -> dict[str, Shape]:
    """Name -> shape, by the component's part of a ModelConfig; a second at full size."""
    return module_shapes(abstract_module(component, SimpleNamespace(**{component: part})))


def _stream(steps: ConversionPlan, tensors: Tensors, writer, param_dtype, bar) -> dict[str, str]:
    """Writes one component. Returns a digest per PyTorch tensor.

    Raises:
        ConversionError: naming all tensors that hold NaN or infinite values, or that are stored
            twice with different values; the component is read to its end for that.
    """
    digests = {}
    faults = []
    second_names = {first: alias for alias, first in steps.duplicates}
    for step in steps.steps:
        tensor = tensors[step.torch_name]
        array = tensor.read()
        alias = second_names.get(step.torch_name)
        if alias is not None and not np.array_equal(bits_of(array), bits_of(tensors[alias].read())):
            faults.append(
                f"{alias} and {step.torch_name} are one tensor but have different values."
            )
        if step.rule.layout is not None:
            array = to_jax_array(step.rule, array)
        digest = array_digest(array)
        digests[f"{steps.component}.{step.torch_name}"] = digest
        if not is_finite(array):
            faults.append(f"{step.torch_name} in {tensor.file} holds NaN or infinite values.")
        if param_dtype is not None and param_dtype != tensor.dtype:
            with np.errstate(over="ignore"):  # reported with its name below
                array = array.astype(param_dtype)
            digest = array_digest(array)
            if param_dtype == "float16" and not is_finite(array):
                faults.append(
                    f"{step.torch_name} has values too large for float16: choose bfloat16."
                )
        if not faults:
            writer.write(steps.component, {step.jax_name: array}, {step.jax_name: digest})
        bar.update(tensor.nbytes)
    for fault in faults:
        steps.add_fault(fault)
    raise_faults(steps.faults, "The source")
    return digests


def _prevailing_dtype(source: WeightSource) -> str:
    """The dtype of most of the U-Net's numbers."""
    sizes: dict[str, int] = {}
    for tensor in source.tensors["unet"].values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return max(sizes, key=sizes.__getitem__)
