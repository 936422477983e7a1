# SPDX-License-Identifier: Apache-2.0
"""Weight files of PyTorch, opened without reading them: names, shapes and dtypes now, data later.

Data are views of a memory map, so opening and reading take no memory.
"""

import functools
import math
import pickle
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from k3jax.convert.arrays import SAFETENSORS_DTYPES, as_numpy
from k3jax.convert.rules import ConversionError, Shape
from k3jax.files import KIND_BYTES, other_kind


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file. `read` gives a read-only view of the file's bytes."""

    shape: Shape
    dtype: str
    file: Path
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * SIZES[self.dtype]


SIZES = {dtype.name: dtype.itemsize for dtype in SAFETENSORS_DTYPES.values()}

Tensors = Mapping[str, Tensor]


def shapes(tensors: Tensors) -> dict[str, Shape]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def open_weights(files: Iterable[Path]) -> dict[str, Tensor]:
    """All tensors of a file or of the shards of one model.

    Raises:
        ConversionError: a file is broken or not of a known kind, or two shards hold the same name.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        opened = open_file(file)
        doubled = tensors.keys() & opened.keys()
        if doubled:
            name = min(doubled)
            raise ConversionError(
                f"{name} is in both {tensors[name].file} and {file}: the shards do not belong "
                "together."
            )
        tensors.update(opened)
    return unwrapped(tensors)


WRAPPERS = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every name of a model."""


def unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of the model itself, with a warning where it was saved in wrappers."""
    prefix = ""
    while tensors and (more := _common_wrapper(tensors, prefix)):
        prefix += more
    if not prefix:
        return tensors
    file = next(iter(tensors.values())).file
    warnings.warn(
        f"{file}: every name starts with {prefix!r}, as DataParallel or torch.compile save a "
        "model; the prefix is removed.",
        stacklevel=3,
    )
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _common_wrapper(names: Iterable[str], prefix: str) -> str | None:
    return next((w for w in WRAPPERS if all(n.startswith(prefix + w) for n in names)), None)


def open_file(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a pickle that is one flat state dict."""
    if file.suffix == ".safetensors":
        return open_safetensors(file)
    return flat(open_pickle(file), file)


def open_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file.

    Raises:
        ConversionError: the file is truncated, damaged, of another kind, or of a dtype that is not
            supported.
    """
    _refuse_other_kinds(file)
    try:
        opened = safe_open(file, "pt")
        slices = {name: opened.get_slice(name) for name in opened.keys()}
    except (SafetensorError, OSError, OverflowError) as error:
        raise ConversionError(
            f"{file} is truncated or damaged ({_first_line(error)}): fetch it again."
        ) from None
    tensors = {}
    for name, part in slices.items():
        kind = part.get_dtype()
        if kind not in SAFETENSORS_DTYPES:
            _refuse_dtype(file, kind, name)
        read = functools.partial(_read_safetensors, opened, name)
        shape, dtype = tuple(part.get_shape()), SAFETENSORS_DTYPES[kind].name
        tensors[name] = Tensor(shape, dtype, file, read)
    return tensors


def _read_safetensors(opened: safe_open, name: str) -> np.ndarray:
    return as_numpy(opened.get_tensor(name))


def _refuse_dtype(file: Path, dtype: str, name: str) -> None:
    raise ConversionError(
        f"{file} has weights in {dtype} ({name}), which is not supported: take the bfloat16, "
        "float16 or float32 files of this model."
    )


def _refuse_other_kinds(file: Path, zipped: bool = False) -> None:
    with file.open("rb") as stream:
        kind = other_kind(stream.read(KIND_BYTES), zipped)
    if kind:
        raise ConversionError(f"{file} {kind}.")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")


def open_pickle(file: Path) -> dict:
    """What torch.save wrote, as (nested) dicts of memory-mapped tensors. Never runs code.

    Raises:
        ConversionError: the file holds something other than tensors, or is broken.
    """
    _refuse_other_kinds(file, zipped=True)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise ConversionError(
            f"{file} holds more than tensors and is refused, since loading it could run code "
            f"({reason})"
        ) from None
    except Exception as error:  # of damaged bytes PyTorch's reader raises nearly everything
        raise ConversionError(
            f"{file} is truncated, or no file that torch.save writes today ({_first_line(error)}): "
            "fetch it again, or save it once more with a current PyTorch."
        ) from None
    if not isinstance(content, Mapping):
        raise ConversionError(f"{file} holds a {type(content).__name__}, not a state dict.")
    return content


def flat(content: Mapping, file: Path) -> dict[str, Tensor]:
    """Tensors of one state dict from a pickle; anything else in it is an error."""
    tensors = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ConversionError(
                f"{file}: {name!r} is a {type(value).__name__}, where a tensor is expected."
            )
        tensors[name] = from_tensor(value, file, name)
    return tensors


def from_tensor(value: torch.Tensor, file: Path, name: str) -> Tensor:
    dtype = str(value.dtype).removeprefix("torch.")
    if value.layout != torch.strided or value.device.type != "cpu":
        raise ConversionError(f"{file}: {name} is {value.layout} on {value.device}, not dense.")
    if dtype not in SIZES:
        _refuse_dtype(file, dtype, name)
    return Tensor(tuple(value.shape), dtype, file, lambda: as_numpy(value))
