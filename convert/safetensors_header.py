# SPDX-License-Identifier: Apache-2.0
"""The header of a .safetensors file, trusted in nothing."""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from k3jax.convert.rules import ConversionError, Shape
from k3jax.files import LFS_ADVICE, LFS_POINTER


SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}

HEADER_BYTES = 100_000_000
"""Most bytes of a header; the limit of the safetensors library."""


class Entry(NamedTuple):
    """What a header says of one tensor; offsets count from the end of the header."""

    dtype: np.dtype
    shape: Shape
    start: int
    stop: int


def read_header(stream: BinaryIO, file: Path) -> tuple[dict[str, Entry], int]:
    """Name -> entry of each tensor, and where the tensors begin.

    Raises:
        ConversionError: the file is truncated, or its header is not what it should be.
    """
    size = os.fstat(stream.fileno()).st_size
    start = stream.read(8)
    refuse_pointer(file, start + stream.read(len(LFS_POINTER)))
    stream.seek(8)
    header_size = int.from_bytes(start, "little")
    if len(start) < 8 or header_size > size - 8:
        raise ConversionError(
            f"{file} is truncated or not a safetensors file ({size} bytes): fetch it again."
        )
    entries = _entries(stream.read(min(header_size, HEADER_BYTES + 1)), file)
    _check_places(entries, file, size - 8 - header_size)
    return entries, 8 + header_size


def refuse_pointer(file: Path, start: bytes) -> None:
    """Raises ConversionError for a git-lfs pointer instead of the file itself."""
    if start.startswith(LFS_POINTER[:16]):
        raise ConversionError(f"{file} {LFS_ADVICE}.")


def _entries(header: bytes, file: Path) -> dict[str, Entry]:
    """Name -> what the header says of the tensor, each on its own as it should be."""
    broken = f"{file} has a broken safetensors header"
    if len(header) > HEADER_BYTES:
        raise ConversionError(f"{broken}: it has more than {HEADER_BYTES} bytes. Fetch it again.")
    try:
        pairs = json.loads(header, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{broken} ({error!r}): fetch it again.") from None
    if not isinstance(pairs, dict):
        raise ConversionError(f"{broken}: it is no JSON object. Fetch it again.")
    entries = {}
    for name, values in pairs.items():
        if name == "__metadata__":
            continue
        if not isinstance(values, dict) or values.keys() != {"dtype", "shape", "data_offsets"}:
            raise ConversionError(f"{broken}: {name} is {str(values)[:80]}. Fetch it again.")
        kind, shape, offsets = values["dtype"], values["shape"], values["data_offsets"]
        if isinstance(kind, str) and _OTHER_DTYPE.fullmatch(kind):
            raise ConversionError(
                f"{file} has weights in {kind} ({name}), which is not supported: convert a "
                "version of them in bfloat16, float16 or float32."
            )
        if (
            not isinstance(kind, str)
            or kind not in SAFETENSORS_DTYPES
            or not _are_sizes(shape)
            or not _are_sizes(offsets)
            or len(offsets) != 2
            or len(shape) > 16
        ):
            raise ConversionError(f"{broken}: {name} is {str(values)[:80]}. Fetch it again.")
        entries[name] = Entry(SAFETENSORS_DTYPES[kind], tuple(shape), *offsets)
    return entries


_OTHER_DTYPE = re.compile(r"(F8_|F6_|F4)\w*|U16|U32|U64|C64")
"""Of the safetensors format, those that are not read here."""


def _are_sizes(values) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**62 for v in values)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name is there twice")
    return values


def _check_places(entries: Mapping[str, Entry], file: Path, size: int) -> None:
    """The tensors must fill the `size` bytes behind the header, one after the other."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        needed = math.prod(entry.shape) * entry.dtype.itemsize
        if entry.stop - entry.start != needed:
            raise ConversionError(
                f"{file} has a broken safetensors header: {name} of shape {entry.shape} and dtype "
                f"{entry.dtype} does not take {entry.stop - entry.start} bytes. Fetch it again."
            )
        if entry.start != end:
            raise ConversionError(
                f"{file} has a broken safetensors header: {name} does not begin where the tensor "
                "before it ends. Fetch it again."
            )
        end = entry.stop
    if end != size:
        raise ConversionError(
            f"{file} is truncated or damaged: its header declares {end} bytes of tensors, and "
            f"{size} are there. Fetch it again."
        )
