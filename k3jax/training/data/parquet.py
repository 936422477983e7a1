# SPDX-License-Identifier: Apache-2.0
"""Parquet files of images, as Hugging Face datasets write them."""

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np

from k3jax.training.data.source import Source, check_utf8


KEPT_BYTES = 1 << 30
"""Size of the row groups that are kept in memory. Reading an image means reading its row group: a
shuffled data set much larger than this needs a cache of latents, or WebDataset."""


class ParquetSource(Source):
    """Rows of Parquet files; images are bytes, or the struct {bytes, path} of Hugging Face."""

    def __init__(
        self,
        paths: list[str],
        image_column: str = "image",
        caption_column: str = "caption",
        kept_bytes: int = KEPT_BYTES,
    ):
        """
        Raises:
            ValueError: a file is not Parquet, lacks a column or has one of another type; a row has
                no caption.
        """
        self._paths = [os.path.abspath(path) for path in paths]
        self._image_column, self._kept_bytes = image_column, kept_bytes
        self._captions: list[str] = []
        self._groups: list[tuple[int, int]] = []  # (file, row group)
        starts = [0]
        self._file_starts = [0]
        for number, path in enumerate(self._paths):
            with _open(path) as file:
                column = _caption_column(file, caption_column)
                _check_columns(path, file, image_column, column)
                for group in range(file.num_row_groups):
                    captions = file.read_row_group(group, columns=[column]).column(0)
                    first = starts[-1] - self._file_starts[-1]
                    self._captions += _captions(captions, path, column, first)
                    self._groups.append((number, group))
                    starts.append(starts[-1] + len(captions))
            self._file_starts.append(starts[-1])
        if not self._captions:
            raise ValueError(f"{', '.join(paths)}: the Parquet files have no rows.")
        self._starts = np.array(starts)
        self._clear()

    def __getstate__(self):
        dropped = {"_kept", "_lock", "_files"}
        return {name: value for name, value in self.__dict__.items() if name not in dropped}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._clear()

    def __len__(self) -> int:
        return len(self._captions)

    def key(self, number: int) -> str:
        file = int(np.searchsorted(self._file_starts, number, "right")) - 1
        name = os.path.splitext(os.path.basename(self._paths[file]))[0]
        return f"{name}/{number - self._file_starts[file]:08d}"

    def caption(self, number: int) -> str:
        return self._captions[number]

    def open(self, number: int) -> BinaryIO:
        return io.BytesIO(self._image(number).as_py())

    def rows(self) -> Iterable[tuple]:
        return zip(map(self.key, range(len(self))), self._captions, strict=True)

    def files(self) -> list[str]:
        return self._paths

    def _clear(self) -> None:
        self._kept: OrderedDict = OrderedDict()
        self._files: dict = {}
        self._lock = threading.Lock()

    def _image(self, number: int):
        """The image's bytes as an Arrow scalar."""
        group = int(np.searchsorted(self._starts, number, "right")) - 1
        with self._lock:  # a Parquet reader is for one thread at a time
            column = self._kept.pop(group, None)
            if column is None:
                column = self._read(group)
            self._kept[group] = column
            while len(self._kept) > 1 and self._kept_size() > self._kept_bytes:
                self._kept.popitem(last=False)
        image = column[number - int(self._starts[group])]
        if not image.is_valid:
            raise ValueError(
                f"image {self.key(number)} has no bytes in column {self._image_column!r}: images "
                "must be in the Parquet file itself, not in files of their own."
            )
        return image

    def _kept_size(self) -> int:
        return sum(column.nbytes for column in self._kept.values())

    def _read(self, group: int):
        import pyarrow.compute as pc

        file, row_group = self._groups[group]
        if file not in self._files:
            self._files[file] = _open(self._paths[file])
        table = self._files[file].read_row_group(row_group, columns=[self._image_column])
        column = table.column(0)
        return pc.struct_field(column, "bytes") if _is_struct(column.type) else column


def _open(path: str):
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ImportError("reading Parquet needs pyarrow: pip install 'k3jax[train]'") from None
    try:
        return parquet.ParquetFile(path, memory_map=False)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read as Parquet ({reason}).") from None


def _caption_column(file, name: str) -> str:
    """The column of captions: of data sets that k3jax wrote, `prompt`."""
    names = file.schema_arrow.names
    return "prompt" if name == "caption" not in names and "prompt" in names else name


def _check_columns(path: str, file, image_column: str, caption_column: str) -> None:
    import pyarrow as pa

    schema = file.schema_arrow
    for setting, name in (("image_column", image_column), ("caption_column", caption_column)):
        if name not in schema.names:
            raise ValueError(
                f"{path} has no column {name!r}; there are {', '.join(schema.names)}: set "
                f"`{setting}`."
            )
    kind = schema.field(image_column).type
    if _is_struct(kind):
        fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        kind = fields.get("bytes", pa.null())
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise ValueError(
            f"{path}: column {image_column!r} must hold the bytes of images, or a struct with a "
            f"field `bytes`, not {schema.field(image_column).type}."
        )


def _is_struct(kind) -> bool:
    import pyarrow as pa

    return pa.types.is_struct(kind)


def _captions(captions, path: str, column: str, first: int) -> list[str]:
    """The captions of an Arrow column that begins at row `first` of the file."""
    try:
        captions = captions.to_pylist()
    except UnicodeDecodeError:
        raise ValueError(
            f"{path}: column {column!r} has texts that are not UTF-8 (in rows {first} to "
            f"{first + len(captions) - 1}): write the file again from UTF-8."
        ) from None
    for row, caption in enumerate(captions, first):
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(
                f"{path}, row {row}: {column!r} must be a text that is not empty, not {caption!r}."
            )
        check_utf8(caption, f"{path}, row {row}: {column!r}")
    return [caption.strip() for caption in captions]
