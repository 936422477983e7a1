# SPDX-License-Identifier: Apache-2.0
"""Prompt files of each format as numbered rows, read from any row on in bounded memory.

A reader gives `(mark, line, values)` for every row, `values` being a dict or, for a line that
cannot be read, the reason as a string. Marks of every MARK_EVERY-th row, kept by who scans the
file, let a later read start near its first row. No reader holds more than a block of a file.
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from k3jax.synthesis.store import open_file


Mark = list[int]
"""Where a row begins: [byte, line] in a text, [row] in a table."""

RowValues = dict[str, Any] | str

MARK_EVERY = 1024
MAX_LINE = 4 << 20  # bytes; a longer line is a file of another kind
FORMATS = ("txt", "jsonl", "csv", "parquet")


class Lines:
    """A text with a row per line; blank lines do not count."""

    def __init__(self, path: str, parse: Callable[[str], RowValues]):
        self.path, self._parse = path, parse

    def rows(self, mark: Mark | None = None) -> Iterator[tuple[Mark, int, RowValues]]:
        with open_file(self.path) as file:
            byte, first = mark or (0, 1)
            file.seek(byte)
            for number, start, _, line in _lines(file, byte, first):
                text = _decoded(line)
                if isinstance(text, _Fault):
                    yield [start, number], number, str(text)
                elif text and not text.isspace():
                    yield [start, number], number, self._parse(text.strip("\r\n"))

    def digest(self) -> str:
        return file_digest(self.path)


class Table:
    """A CSV file with a header. A cell that is empty says nothing; cells may hold line breaks."""

    def __init__(self, path: str):
        self.path = path
        with open_file(path) as file:
            lines = _Recorder(_lines(file, 0, 1))
            try:
                self.header = [name.strip() for name in next(csv.reader(lines, strict=True))]
            except StopIteration:
                raise ValueError(f"{path} is empty: a CSV file begins with its columns.") from None
            except csv.Error as error:
                raise ValueError(f"{path}, line 1: not CSV ({error}).") from None
        self._first = [lines.byte, lines.number]

    def rows(self, mark: Mark | None = None) -> Iterator[tuple[Mark, int, RowValues]]:
        with open_file(self.path) as file:
            byte, number = mark or self._first
            file.seek(byte)
            lines = _Recorder(_lines(file, byte, number))
            lines.byte, lines.number = byte, number
            reader = csv.reader(lines, strict=True)
            while True:
                start = [lines.byte, lines.number]
                lines.fault = None
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield start, start[1], f"not CSV ({error})"
                    continue
                if lines.fault:
                    yield start, start[1], lines.fault
                elif cells and len(cells) != len(self.header):
                    reason = f"has {len(cells)} cells under {len(self.header)} columns"
                    yield start, start[1], reason
                elif cells:
                    values = zip(self.header, cells, strict=True)
                    yield start, start[1], {name: cell or None for name, cell in values}

    def digest(self) -> str:
        return file_digest(self.path)


class Parquet:
    """A Parquet file; a line is a row, counted from 1."""

    def __init__(self, path: str, wanted: Iterable[str]):
        import pyarrow.parquet as pq

        self.path, self._wanted = path, frozenset(wanted)
        with open_file(path) as file:
            try:
                self.columns = pq.read_schema(file).names
            except Exception as error:
                raise ValueError(f"{path} cannot be read as Parquet ({error}).") from None

    def rows(self, mark: Mark | None = None) -> Iterator[tuple[Mark, int, RowValues]]:
        import pyarrow.parquet as pq

        first = mark[0] if mark else 0
        read = [name for name in self.columns if name in self._wanted]
        others = dict.fromkeys(name for name in self.columns if name not in self._wanted)
        with open_file(self.path) as file:
            table = pq.ParquetFile(file)
            counts = [table.metadata.row_group(g).num_rows for g in range(table.num_row_groups)]
            group = row = 0
            while group < len(counts) and row + counts[group] <= first:
                row += counts[group]
                group += 1
            groups = range(group, len(counts))
            for batch in table.iter_batches(MARK_EVERY, row_groups=list(groups), columns=read):
                if row + len(batch) > first:
                    for values in batch.to_pylist():
                        if row >= first:
                            yield [row], row + 1, {**others, **values}
                        row += 1
                else:
                    row += len(batch)

    def digest(self) -> str:
        return file_digest(self.path)


class HubDataset:
    """A data set of the Hugging Face library: NAME[:SPLIT], or a folder of `save_to_disk`."""

    def __init__(self, name: str, wanted: Iterable[str]):
        import datasets

        self.path = f"hf:{name}"
        path, _, split = name.partition(":")
        try:
            if split:
                data = datasets.load_dataset(path, split=split)
            else:
                data = _load_saved(datasets, path)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{self.path} cannot be loaded ({reason[:300]}).") from None
        self.columns = data.column_names
        read = [column for column in self.columns if column in frozenset(wanted)]
        self._others = dict.fromkeys(c for c in self.columns if c not in frozenset(wanted))
        self._data = data.select_columns(read) if read else None

    def rows(self, mark: Mark | None = None) -> Iterator[tuple[Mark, int, RowValues]]:
        first = mark[0] if mark else 0
        count = 0 if self._data is None else len(self._data)
        for start in range(first, count, MARK_EVERY):
            stop = min(start + MARK_EVERY, count)
            part = self._data[start:stop]
            for row in range(start, stop):
                values = {name: column[row - start] for name, column in part.items()}
                yield [row], row + 1, {**self._others, **values}

    def digest(self) -> str:
        """Of the values: the library's files lie elsewhere on every machine."""
        digest = hashlib.sha256()
        for _, _, values in self.rows():
            digest.update(json.dumps(values, sort_keys=True, default=str).encode())
        return digest.hexdigest()


Reader = Lines | Table | Parquet | HubDataset


def reader_of(path: str, kind: str | None, wanted: Iterable[str]) -> Reader:
    """The reader of one file.

    Args:
        path: local, or an address that fsspec knows; or hf:NAME[:SPLIT].
        kind: one of FORMATS; None: by the ending.
        wanted: columns that will be used; others of a table are not read.
    """
    if path.startswith("hf:") and not path.startswith("hf://"):
        return HubDataset(path.removeprefix("hf:"), wanted)
    kind = kind or path.rsplit(".", 1)[-1].lower()
    if kind == "txt":
        return Lines(path, lambda text: {"prompt": text.strip()})
    if kind in ("jsonl", "ndjson"):
        return Lines(path, _object)
    if kind == "csv":
        return Table(path)
    if kind == "parquet":
        return Parquet(path, wanted)
    raise ValueError(
        f"{path} has none of the endings .{', .'.join(FORMATS)}: say what it is with "
        "--prompts-format."
    )


def file_digest(path: str) -> str:
    """sha256 of a file, as hexadecimal digits."""
    with open_file(path) as file:
        if isinstance(file, io.BufferedReader):
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while part := file.read(1 << 20):
            digest.update(part)
        return digest.hexdigest()


class _Fault(str):
    """Why a line cannot be read."""


class _Recorder:
    """Lines for csv.reader, which says neither how many it took nor where the next one begins."""

    def __init__(self, lines: Iterator[tuple[int, int, int, bytes]]):
        self._lines = lines
        self.byte, self.number, self.fault = 0, 1, None

    def __iter__(self):
        return self

    def __next__(self) -> str:
        number, _, self.byte, line = next(self._lines)
        self.number = number + 1
        text = _decoded(line)
        if isinstance(text, _Fault):
            self.fault = str(text)
            return line.decode(errors="replace")
        return text


def _lines(file: BinaryIO, byte: int, number: int) -> Iterator[tuple[int, int, int, bytes]]:
    """(number, first byte, byte behind it, content) of every line; of a too long one the start."""
    while line := file.readline(MAX_LINE):
        end, rest = byte + len(line), line
        while len(rest) == MAX_LINE and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE)
            end += len(rest)
        yield number, byte, end, line
        byte, number = end, number + 1


def _decoded(line: bytes) -> str | _Fault:
    if len(line) >= MAX_LINE:
        return _Fault(f"is longer than {MAX_LINE >> 20} MB")
    try:
        return line.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        return _Fault(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8")


def _object(text: str) -> RowValues:
    try:
        values = json.loads(text)
    except RecursionError:
        return "not JSON (nested too deeply)"
    except ValueError as error:
        place = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        return f"not JSON ({getattr(error, 'msg', error)}{place})"
    if not isinstance(values, dict):
        return f"is not a JSON object but {text[:40]!r}"
    return values


def _load_saved(datasets, path: str):
    data = datasets.load_from_disk(path)
    if isinstance(data, dict):
        raise ValueError(f"it has the splits {', '.join(data)}: give one as hf:{path}/SPLIT")
    return data
