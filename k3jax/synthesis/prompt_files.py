# SPDX-License-Identifier: Apache-2.0
"""Prompt files of each format, read from front to back as numbered rows.

Every row is `(line, values)`, where `values` is a dict, or a string with the reason why the row
cannot be read. Text formats use the standard library's readers, because those know the line of
each row and go on after a bad one; Parquet uses pyarrow's.
"""

import csv
import gzip
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO

import pyarrow.parquet as pq

from k3jax.files import LFS_ADVICE, LFS_POINTER
from k3jax.synthesis.store import open_file


RowValues = dict[str, Any] | str

MAX_LINE = 4 << 20  # bytes; a longer line is a file of another kind
ROWS_AT_ONCE = 1024
FORMATS = ("txt", "jsonl", "json", "csv", "tsv", "parquet")
SIGNATURES = {
    b"PK\x03\x04": "is a zip archive or an Excel file: unpack it, or save it as CSV in UTF-8",
    b"\xff\xfe": "is UTF-16 text: convert it with `iconv -f UTF-16 -t UTF-8`",
    b"\xfe\xff": "is UTF-16 text: convert it with `iconv -f UTF-16 -t UTF-8`",
    b"PAR1": "is a Parquet file: give it the ending .parquet, or use --prompts-format parquet",
    LFS_POINTER: LFS_ADVICE,
}

_JSON = json.JSONDecoder()
_JSON_MARK = re.compile(r"[ \t\n\r]*([\[\],]?)[ \t\n\r]*")


class PromptFile:
    """A prompt file, local or at an address.

    Attributes:
        path: local, or an address that fsspec knows.
        kind: one of FORMATS.
    """

    def __init__(self, path: str, kind: str | None, used: Collection[str], required: str):
        """
        Args:
            kind: one of FORMATS; None: by the file's ending, to which .gz may be added.
            used: the columns to read; others of a table come out as None.
            required: the column of the prompts.
        """
        ending = path.lower().removesuffix(".gz").rsplit(".", 1)[-1]
        kind = kind or {"ndjson": "jsonl", "text": "txt"}.get(ending, ending)
        if kind not in FORMATS:
            raise ValueError(
                f"{path} has none of the endings .{', .'.join(FORMATS)} (or one of them and .gz): "
                "name its format with --prompts-format."
            )
        self.path, self.kind, self._used, self._required = path, kind, used, required

    def rows(self) -> Iterator[tuple[int, RowValues]]:
        """All rows; blank lines are none.

        Raises:
            ValueError: the file cannot be read, or lacks the column of the prompts.
        """
        with open_file(self.path) as raw:
            if raw.read(2) == b"\x1f\x8b" and self.kind != "parquet":
                raw.seek(0)
                file = gzip.open(raw)
            else:
                file = raw
            try:
                file.seek(0)
                head = file.read(4096)
                file.seek(0)
                self._check_signature(head)
                yield from self._rows(file, head)
            except (EOFError, OSError, zlib.error) as error:
                reason = getattr(error, "strerror", None) or error
                raise ValueError(f"{self.path} cannot be read: {reason}.") from None

    def digest(self) -> str:
        return file_digest(self.path)

    def _rows(self, file: BinaryIO, head: bytes) -> Iterator[tuple[int, RowValues]]:
        if self.kind == "parquet":
            return self._parquet_rows(file)
        if self.kind in ("csv", "tsv"):
            return self._table_rows(file)
        # Many files that end in .json hold JSON lines.
        if self.kind == "json" and head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"{":
            return self._array_rows(file)
        return self._line_rows(file)

    def _line_rows(self, file: BinaryIO) -> Iterator[tuple[int, RowValues]]:
        for number, text, fault in _lines(file):
            if fault:
                yield number, fault
            elif text and not text.isspace():
                yield (
                    number,
                    {"prompt": text.strip()} if self.kind == "txt" else _object(text.strip()),
                )

    def _array_rows(self, file: BinaryIO) -> Iterator[tuple[int, RowValues]]:
        """The elements of one JSON array, which is held in memory."""
        content = file.read().removeprefix(b"\xef\xbb\xbf")
        place, line, expected = 0, 1, "["
        try:
            text = content.decode()
            while True:
                mark = _JSON_MARK.match(text, place)
                line += text.count("\n", place, mark.end())
                place = mark.end()
                first = expected == "["
                if (mark[1] == "]" and not first) or (first and text.startswith("]", place)):
                    return
                if mark[1] != expected:
                    raise json.JSONDecodeError(f"Expecting {expected!r}", text, mark.start(1))
                value, end = _JSON.raw_decode(text, place)
                yield line, value if isinstance(value, dict) else _no_object(text[place:end])
                line += text.count("\n", place, end)
                place, expected = end, ","
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            reason = _not_utf8(error.start - content.rfind(b"\n", 0, error.start))
        except RecursionError:
            reason = "not JSON (nested too deeply)"
        except ValueError as error:
            line = getattr(error, "lineno", line)
            reason = f"not a JSON array ({getattr(error, 'msg', error)})"
        raise ValueError(f"{self.path}, line {line}: {reason}.")

    def _table_rows(self, file: BinaryIO) -> Iterator[tuple[int, RowValues]]:
        """A CSV or TSV file with a header; cells may hold line breaks, empty ones are None."""
        faults: list[str] = []  # of the lines of one row

        def texts():
            for _, text, fault in _lines(file):
                faults.extend([fault] if fault else [])
                yield text

        lines = texts()
        first = next(lines, "")
        if faults:
            raise ValueError(f"{self.path}, line 1: {faults[0]}.")
        delimiter = "\t" if self.kind == "tsv" else ","
        if "," not in first and self.kind == "csv":
            delimiter = next((mark for mark in ";\t" if mark in first), ",")
        reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
        except csv.Error as error:
            raise ValueError(f"{self.path}, line 1: not CSV ({error}).") from None
        if not any(header):
            raise ValueError(f"{self.path} is empty: its first line must name the columns.")
        check_columns(self.path, header, self._required)
        while True:
            line = reader.line_num + 1
            faults.clear()
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, f"not CSV ({error})"
                continue
            if faults:
                yield line, faults[0]
            elif cells and len(cells) != len(header):
                yield line, f"has {len(cells)} cells under {len(header)} columns"
            elif cells:
                yield line, dict(zip(header, (cell or None for cell in cells), strict=True))

    def _parquet_rows(self, file: BinaryIO) -> Iterator[tuple[int, RowValues]]:
        try:
            table = pq.ParquetFile(file)
            columns = table.schema_arrow.names
        except Exception as error:  # whatever pyarrow raises for a damaged file
            raise ValueError(
                f"{self.path} cannot be read as Parquet ({_one_line(error)})."
            ) from None
        check_columns(self.path, columns, self._required)
        read = [name for name in columns if name in self._used]
        others = dict.fromkeys(name for name in columns if name not in self._used)
        row = 0
        try:
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=read):
                for values in batch.to_pylist():
                    row += 1
                    yield row, {**others, **values}
        except (OSError, ValueError, OverflowError, NotImplementedError) as error:
            reason = _one_line(error)
            raise ValueError(f"{self.path} cannot be read after row {row} ({reason}).") from None

    def _check_signature(self, head: bytes) -> None:
        if self.kind == "parquet":
            return
        for signature, advice in SIGNATURES.items():
            if head.startswith(signature):
                raise ValueError(f"{self.path} {advice}.")
        if max(head[::2].count(0), head[1::2].count(0)) > len(head) / 8:
            raise ValueError(
                f"{self.path} is no UTF-8 text but UTF-16 without a mark, or no text at all: "
                "convert it with `iconv -f UTF-16LE -t UTF-8`."
            )


class HubDataset:
    """A data set of the Hugging Face library: NAME[:SPLIT], or a folder of `save_to_disk`."""

    def __init__(self, name: str, used: Collection[str], required: str):
        import datasets

        self.path = f"hf:{name}"
        path, _, split = name.partition(":")
        try:
            if split:
                data = datasets.load_dataset(path, split=split)
            else:
                data = datasets.load_from_disk(path)
                if isinstance(data, dict):
                    splits = ", ".join(data)
                    raise ValueError(f"it has the splits {splits}: give one as hf:{path}/SPLIT")
        except Exception as error:
            raise ValueError(f"{self.path} cannot be loaded ({_one_line(error)}).") from None
        check_columns(self.path, data.column_names, required)
        self._data = data.select_columns([c for c in data.column_names if c in used])
        self._others = dict.fromkeys(c for c in data.column_names if c not in used)

    def rows(self) -> Iterator[tuple[int, RowValues]]:
        for row, values in enumerate(self._data, 1):
            yield row, {**self._others, **values}

    def digest(self) -> str:
        """Of the values: the library's files are in another place on every machine."""
        digest = hashlib.sha256()
        for _, values in self.rows():
            digest.update(json.dumps(values, sort_keys=True, default=str).encode())
        return digest.hexdigest()


def open_prompts(
    path: str, kind: str | None, used: Collection[str], required: str
) -> PromptFile | HubDataset:
    """The reader of one file, or of hf:NAME[:SPLIT]; see `PromptFile`."""
    if path.startswith("hf:") and not path.startswith("hf://"):
        return HubDataset(path.removeprefix("hf:"), used, required)
    return PromptFile(path, kind, used, required)


def file_digest(path: str) -> str:
    """sha256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def printable(text: str) -> str:
    """A text for one line of a terminal: control characters become escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def check_columns(path: str, columns: list[str], required: str) -> None:
    """Refuses a table without the column of the prompts, or with two columns of one name."""
    shown = printable(", ".join(columns))[:300]
    if required not in columns:
        raise ValueError(
            f"{path} has no column {required!r} (it has: {shown}): name the column of the prompts "
            "with --column prompt=NAME."
        )
    if len(set(columns)) < len(columns):
        raise ValueError(f"{path} has two columns of the same name ({shown}): rename one.")


def _lines(file: BinaryIO) -> Iterator[tuple[int, str, str | None]]:
    """(number, text, why it cannot be used or None) of every line; of a too long one the start."""
    number = 0
    while line := file.readline(MAX_LINE):
        number, fault = number + 1, None
        rest = line
        while len(rest) == MAX_LINE and not rest.endswith(b"\n"):
            fault = f"is longer than {MAX_LINE >> 20} MB"
            rest = file.readline(MAX_LINE)
        try:
            text = line.removeprefix(b"\xef\xbb\xbf").decode()
        except UnicodeDecodeError as error:
            text, fault = line.decode(errors="replace"), fault or _not_utf8(error.start + 1)
        yield number, text, fault


def _object(text: str) -> RowValues:
    try:
        values = json.loads(text)
    except RecursionError:
        return "not JSON (nested too deeply)"
    except ValueError as error:
        place = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        return f"not JSON ({getattr(error, 'msg', error)}{place})"
    return values if isinstance(values, dict) else _no_object(text)


def _no_object(text: str) -> str:
    return f"is not a JSON object but {text[:40]!r}"


def _not_utf8(byte: int) -> str:
    return (
        f"byte {byte} is not UTF-8 (Latin-1 or Windows-1252?): convert the file with "
        "`iconv -f WINDOWS-1252 -t UTF-8`"
    )


def _one_line(error: Exception) -> str:
    return printable(" ".join(str(error).split()))[:300]
