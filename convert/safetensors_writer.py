# SPDX-License-Identifier: Apache-2.0
"""Writing .safetensors files tensor by tensor, without ever holding more than one of them.

The format (github.com/huggingface/safetensors) is the length of a JSON header in 8 bytes, the
header with dtype, shape and place of each tensor, and the bytes of the tensors.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from k3jax.convert.arrays import SAFETENSORS_DTYPES
from k3jax.convert.rules import Shape
from k3jax.files import shortened


NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}

Entry = tuple[np.dtype, Shape]


def nbytes(entry: Entry) -> int:
    return entry[0].itemsize * math.prod(entry[1])


class SafetensorsWriter:
    """One file; tensors are written in any order, and close() names those that are missing."""

    def __init__(self, path: Path, entries: Mapping[str, Entry]):
        self.path = path
        self._entries = dict(entries)
        self._places = {}
        header: dict = {"__metadata__": {"format": "pt"}}
        end = 0
        # Wide dtypes first, so that every tensor is aligned for its dtype.
        for name in sorted(entries, key=lambda name: (-entries[name][0].itemsize, name)):
            dtype, shape = entries[name]
            begin, end = end, end + nbytes(entries[name])
            self._places[name] = begin
            header[name] = {
                "dtype": NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._start = 8 + len(text)
        self._file.truncate(self._start + end)

    def write(self, name: str, array: np.ndarray) -> None:
        dtype, shape = self._entries[name]
        if array.dtype != dtype or array.shape != tuple(shape):
            raise ValueError(f"{name} is {array.dtype}{array.shape}, announced as {dtype}{shape}.")
        self._file.seek(self._start + self._places.pop(name))
        self._file.write(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))

    def close(self) -> None:
        self._file.close()
        if self._places:
            raise ValueError(f"{self.path} was closed without {shortened(self._places)}.")


def write_index(files: Mapping[str, Mapping[str, Entry]], path: Path) -> None:
    """The index of a sharded model, as transformers writes it.

    Args:
        files: file name -> the tensors in it.
    """
    weight_map = {name: file for file, entries in files.items() for name in entries}
    size = sum(nbytes(entry) for entries in files.values() for entry in entries.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    path.write_text(json.dumps(index, indent=2) + "\n")


def shards(entries: Mapping[str, Entry], limit: int, stem: str, end: str) -> dict[str, dict]:
    """File name -> tensors: one file, or as many of at most `limit` bytes as are needed."""
    parts: list[dict[str, Entry]] = [{}]
    size = 0
    for name, entry in entries.items():
        if parts[-1] and size + nbytes(entry) > limit:
            parts.append({})
            size = 0
        parts[-1][name] = entry
        size += nbytes(entry)
    if len(parts) == 1:
        return {f"{stem}.{end}": parts[0]}
    return {
        f"{stem}-{i:05d}-of-{len(parts):05d}.{end}": part for i, part in enumerate(parts, start=1)
    }
