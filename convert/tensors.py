# SPDX-License-Identifier: Apache-2.0
"""Weight files of PyTorch, opened without reading them: names, shapes and dtypes now, data later.

Data comes as views of a memory map, so opening and reading cost no memory of their own.
"""

import contextlib
import math
import mmap
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from k3jax.convert.arrays import as_numpy
from k3jax.convert.rules import ConversionError, Shape
from k3jax.convert.safetensors_header import SAFETENSORS_DTYPES, read_header, refuse_pointer
from k3jax.files import LFS_POINTER


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file. `read` gives a read-only view of the file's bytes."""

    shape: Shape
    dtype: str
    file: Path
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * SAFETENSORS_SIZES[self.dtype]


SAFETENSORS_SIZES = {dtype.name: dtype.itemsize for dtype in SAFETENSORS_DTYPES.values()}

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
    return _unwrapped(tensors)


WRAPPERS = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every name of a model."""


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of the model itself, where it was saved in a wrapper, or in several."""
    for prefix in WRAPPERS:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return _unwrapped({name.removeprefix(prefix): t for name, t in tensors.items()})
    return tensors


def open_file(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a pickle that is one flat state dict."""
    if file.suffix == ".safetensors":
        return open_safetensors(file)
    return flat(open_pickle(file), file)


def open_safetensors(file: Path) -> dict[str, Tensor]:
    """Reads the header of a .safetensors file.

    Raises:
        ConversionError: the file is truncated, or its header is not what it should be.
    """
    with file.open("rb") as stream:
        entries, base = read_header(stream, file)
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_SEQUENTIAL)

    def reader(dtype, shape, begin):
        def read():
            _populate(mapped, base + begin, math.prod(shape) * dtype.itemsize)
            array = np.frombuffer(mapped, dtype, math.prod(shape), base + begin).reshape(shape)
            return array if array.flags.aligned else array.copy()

        return read

    return {
        name: Tensor(e.shape, e.dtype.name, file, reader(e.dtype, e.shape, e.start))
        for name, e in entries.items()
    }


_MADV_POPULATE_READ = 22  # Linux 5.14; not named in Python's mmap


def _populate(mapped: mmap.mmap, start: int, size: int) -> None:
    """Brings a range of a file into the page tables at once, instead of in thousands of faults."""
    page = start % mmap.PAGESIZE
    with contextlib.suppress(OSError, ValueError):
        mapped.madvise(_MADV_POPULATE_READ, start - page, size + page)


def open_pickle(file: Path) -> dict:
    """What torch.save wrote, as (nested) dicts of memory-mapped tensors. Never runs code.

    Raises:
        ConversionError: the file holds something other than tensors, or is broken.
    """
    with file.open("rb") as stream:
        refuse_pointer(file, stream.read(len(LFS_POINTER)))
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise ConversionError(
            f"{file} holds more than tensors and is refused, since loading it could run code "
            f"({reason})"
        ) from None
    except Exception as error:  # of damaged bytes PyTorch's reader raises nearly everything
        reason = (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
        raise ConversionError(
            f"{file} is truncated, or no file that torch.save writes today ({reason}): fetch it "
            "again, or save it once more with a current PyTorch."
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
        tensors[name] = from_tensor(value, file)
    return _unwrapped(tensors)


def from_tensor(value: torch.Tensor, file: Path) -> Tensor:
    dtype = str(value.dtype).removeprefix("torch.")
    if value.layout != torch.strided or value.device.type != "cpu":
        raise ConversionError(f"{file}: a tensor is {value.layout} on {value.device}, not dense.")
    if dtype not in SAFETENSORS_SIZES:
        raise ConversionError(f"{file}: dtype {dtype} of a tensor is not supported.")
    return Tensor(tuple(value.shape), dtype, file, lambda: as_numpy(value))
