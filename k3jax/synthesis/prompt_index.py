# SPDX-License-Identifier: Apache-2.0
"""All prompts of a data set as rows with global numbers, from one file, several, or a pipe.

The files are read once from end to end, which finds every fault before anything is made; what is
kept of that is an index of a few bytes per thousand rows. Afterwards the rows of a shard are read
where they stand.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
import tempfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from k3jax.synthesis.prompt_files import MARK_EVERY, Mark, RowValues, file_digest, reader_of
from k3jax.synthesis.samples import COLUMNS, Row, RowRules
from k3jax.synthesis.store import Store, matching_files


SHOWN_FAULTS = 5


@dataclass(frozen=True)
class FileIndex:
    name: str
    sha256: str
    rows: int
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class PromptIndex:
    """What reading all prompts once has found.

    Attributes:
        duplicates: numbers of rows with the id of an earlier one -> that one's line.
        sizes: (width, height) -> rows.
        faults: how many lines are bad; `examples` says of the first few what is wrong.
        unused: columns that mean nothing here.
        tasks: "text", "image", "inpaint": what the rows ask for.
    """

    files: tuple[FileIndex, ...]
    duplicates: Mapping[int, str]
    sizes: Mapping[tuple[int, int], int]
    faults: int
    examples: tuple[str, ...]
    unused: tuple[str, ...]
    tasks: tuple[str, ...]

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)


class PromptSource:
    """The rows of prompt files, in the order of the files."""

    def __init__(
        self,
        paths: Sequence[str],
        rules: RowRules,
        kind: str | None = None,
        columns: Mapping[str, str] | None = None,
    ):
        """
        Args:
            paths: files and patterns; see `reader_of`.
            kind: format of the files; by their endings if None.
            columns: known column -> its name in the files; "": pass it over.

        Raises:
            ValueError: no file, one that cannot be opened, or one without prompts.
        """
        self._rules = rules
        self._names = {name: name for name in COLUMNS} | dict(columns or {})
        unknown = [name for name in self._names if name not in COLUMNS]
        if unknown:
            raise ValueError(f"--column {unknown[0]}: known are {', '.join(COLUMNS)}.")
        wanted = [name for name in self._names.values() if name]
        found = [path for pattern in paths for path in matching_files(pattern)]
        if not found:
            raise ValueError(f"no file matches {', '.join(paths)}.")
        self._readers = [reader_of(path, kind, wanted) for path in found]
        for reader in self._readers:
            there = getattr(reader, "columns", getattr(reader, "header", None))
            if there is not None:
                self._check_there(reader.path, there)

    @functools.cached_property
    def digests(self) -> list[str]:
        """sha256 of every file's content."""
        return [reader.digest() for reader in self._readers]

    @property
    def description(self) -> dict[str, str]:
        """How the files are read, besides the rules."""
        return {"readers": " ".join(type(r).__name__ for r in self._readers), **self._names}

    def scan(self, progress: bool = False) -> PromptIndex:
        """Reads everything once."""
        files, hashes, tasks = [], array("q"), set()
        sizes: dict[tuple[int, int], int] = {}
        faults, examples, columns = 0, [], {}
        for number, reader in enumerate(self._readers):
            marks, count = [], 0
            for mark, line, values in tqdm(
                reader.rows(), desc="reading prompts", unit="row", disable=not progress, leave=False
            ):
                if count % MARK_EVERY == 0:
                    marks.append(mark)
                count += 1
                row = self._row(values, number, line)
                if isinstance(row, str):
                    hashes.append(hash((len(hashes), "bad")))
                    faults += 1
                    if len(examples) < SHOWN_FAULTS:
                        examples.append(f"{self._where(number, line)} {row}")
                else:
                    hashes.append(hash(row.id))
                    size = (row.width, row.height)
                    sizes[size] = sizes.get(size, 0) + 1
                    tasks.add("text" if row.image is None else "inpaint" if row.mask else "image")
                if isinstance(values, dict) and len(columns) < 1000:
                    columns.update(dict.fromkeys(values))
            files.append(FileIndex(_last(reader.path), self.digests[number], count, tuple(marks)))
        unused = self._unused(columns)
        index = PromptIndex(
            tuple(files), {}, sizes, faults, tuple(examples), unused, tuple(sorted(tasks))
        )
        duplicates = self._duplicates(index, np.frombuffer(hashes, np.int64))
        return dataclasses.replace(
            index,
            duplicates={row: first for row, (first, _) in duplicates.items()},
            faults=faults + len(duplicates),
            examples=(*examples, *(text for _, text in duplicates.values()))[:SHOWN_FAULTS],
        )

    def rows(
        self, index: PromptIndex, start: int, stop: int
    ) -> Iterator[tuple[int, int, str, Row | str]]:
        """(number, line, default id, row or why it is bad) of the rows from `start` to `stop`."""
        first = 0
        for number, (reader, file) in enumerate(zip(self._readers, index.files, strict=True)):
            begin, end = max(start - first, 0), min(stop - first, file.rows)
            if begin < end:
                at = begin - begin % MARK_EVERY
                for _, line, values in reader.rows(file.marks[at // MARK_EVERY]):
                    if at >= begin:
                        row = self._row(values, number, line)
                        if first + at in index.duplicates:
                            row = f"has the id of {index.duplicates[first + at]}"
                        if isinstance(row, str):
                            row = f"{self._where(number, line)} {row}"
                        yield first + at, line, self._default_id(number, line), row
                    at += 1
                    if at == end:
                        break
            first += file.rows

    def _row(self, values: RowValues, file: int, line: int) -> Row | str:
        if isinstance(values, str):
            return values
        known = {}
        for name, theirs in self._names.items():
            if theirs and values.get(theirs) is not None:
                known[name] = values[theirs]
        try:
            return self._rules.row(known, self._default_id(file, line))
        except ValueError as error:
            if "prompt" not in known and self._names["prompt"] not in values:
                keys = ", ".join(map(str, values))[:200]
                return f"has no {self._names['prompt']!r} (it has: {keys})"
            return str(error)

    def _default_id(self, file: int, line: int) -> str:
        return f"{line:09d}" if len(self._readers) == 1 else f"{file:04d}-{line:09d}"

    def _where(self, file: int, line: int) -> str:
        return f"{_last(self._readers[file].path)}, line {line}:"

    def _check_there(self, path: str, there: Sequence[str]) -> None:
        if self._names["prompt"] not in there:
            raise ValueError(
                f"{path} has no column {self._names['prompt']!r} (it has: {', '.join(there)}): "
                "name that of the prompts with --column prompt=NAME."
            )

    def _unused(self, columns: Mapping[str, Any]) -> tuple[str, ...]:
        """Columns that mean nothing; refused where they look like misspelt ones."""
        unused = [str(name) for name in columns if name not in self._names.values()]
        free = [name for name, theirs in self._names.items() if theirs == name != "prompt"]
        free = [name for name in free if name not in columns]
        for name in unused:
            near = difflib.get_close_matches(name.lower(), free, n=1, cutoff=0.85)
            if near:
                raise ValueError(
                    f"the prompts have a column {name!r}: if {near[0]!r} is meant, say --column "
                    f"{near[0]}={name}; if not, --column {near[0]}=."
                )
        return tuple(unused)

    def _duplicates(self, index: PromptIndex, hashes: np.ndarray) -> dict[int, tuple[str, str]]:
        """Row with the id of an earlier one -> (that one's line, a sentence)."""
        order = np.argsort(hashes, kind="stable")
        equal = hashes[order][1:] == hashes[order][:-1]
        doubtful = sorted({*order[1:][equal].tolist(), *order[:-1][equal].tolist()})
        if not doubtful:
            return {}
        seen, duplicates, wanted = {}, {}, set(doubtful)
        number = 0
        for file, reader in enumerate(self._readers):
            for _, line, values in reader.rows():
                if number in wanted and not isinstance(row := self._row(values, file, line), str):
                    where = self._where(file, line).rstrip(":")
                    if row.id in seen:
                        reason = f"{where}: has the id {row.id[:80]!r} of {seen[row.id]}"
                        duplicates[number] = (seen[row.id], reason)
                    else:
                        seen[row.id] = where
                number += 1
        return duplicates


def index_to_json(index: PromptIndex) -> bytes:
    values = dataclasses.asdict(index)
    values["sizes"] = [[*size, count] for size, count in index.sizes.items()]
    values["duplicates"] = [[row, first] for row, first in index.duplicates.items()]
    return json.dumps(values).encode()


def index_from_json(content: bytes) -> PromptIndex:
    """The inverse; a ValueError, KeyError or TypeError for anything else."""
    values = json.loads(content)
    return PromptIndex(
        tuple(FileIndex(**{**f, "marks": tuple(f["marks"])}) for f in values["files"]),
        {row: first for row, first in values["duplicates"]},
        {(width, height): count for width, height, count in values["sizes"]},
        values["faults"],
        tuple(values["examples"]),
        tuple(values["unused"]),
        tuple(values["tasks"]),
    )


def spool(stream, store: Store, kind: str) -> str:
    """Keeps what comes through a pipe in the data set's folder, where a restart finds it.

    Returns:
        Its name there.

    Raises:
        ValueError: the folder has another content of that name already.
    """
    name = f"prompts.{kind}"
    with tempfile.NamedTemporaryFile() as copy:
        digest = hashlib.sha256()
        while part := stream.read(1 << 20):
            digest.update(part)
            copy.write(part)
        copy.flush()
        if store.exists(name):
            if file_digest(f"{store}/{name}") != digest.hexdigest():
                raise ValueError(
                    f"standard input is not what {store}/{name} holds: take another folder."
                )
            return name
        copy.seek(0)
        with store.create(name) as file:
            while part := copy.read(1 << 20):
                file.write(part)
    return name


def _last(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]
