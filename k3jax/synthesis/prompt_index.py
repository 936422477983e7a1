# SPDX-License-Identifier: Apache-2.0
"""All prompts of a data set as one table of checked rows, from one file, several, or a pipe.

The files are read once from end to end, which finds every fault before the model is loaded. The
checked rows go into prompts-index.parquet of the data set, from which every process of the run
reads the rows of its shards.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
import shutil
import tempfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, get_args, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from k3jax.synthesis.prompt_files import RowValues, file_digest, open_prompts, printable
from k3jax.synthesis.samples import COLUMNS, RowRules, Sample
from k3jax.synthesis.store import Store, matching_files


INDEX = "prompts-index.parquet"
SHOWN_FAULTS = 5
GROUP = 8192  # rows of a row group
_KEY = b"k3jax"
_ARROW = {int: pa.int64(), float: pa.float64(), str: pa.string()}
_SCHEMA = pa.schema(
    (name, _ARROW[(get_args(hint) or (hint,))[0]]) for name, hint in get_type_hints(Sample).items()
)


@dataclass(frozen=True)
class Summary:
    """What reading all prompt files has found.

    Attributes:
        key: hash of all that the index depends on.
        files: name, sha256 and rows of each.
        sizes: (width, height, rows) of each size.
        faults: number of bad rows; `examples` has sentences on the first few.
        unused: columns of the files that are not used.
        tasks: the operations that the rows ask for; see `Sample.operation`.
    """

    key: str
    files: Sequence[Mapping[str, Any]]
    sizes: Sequence[tuple[int, int, int]]
    faults: int
    examples: Sequence[str]
    unused: Sequence[str]
    tasks: Sequence[str]


class PromptIndex:
    """The table of checked rows, and its summary."""

    def __init__(self, file: BinaryIO, stored: bool = False):
        """
        Args:
            stored: the file is the one in the data set's folder.

        Raises:
            ValueError: the file is damaged, or of another version.
        """
        try:
            self._file, self._stored = file, stored
            self._table = pq.ParquetFile(file, page_checksum_verification=True)
            self.summary = Summary(**json.loads(self._table.metadata.metadata[_KEY]))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{INDEX} is damaged ({error})") from None

    @property
    def rows(self) -> int:
        return self._table.metadata.num_rows

    def read(self, start: int, stop: int) -> Iterator[Sample]:
        """The rows from `start` to `stop`, each as a sample whose `index` is the row's number."""
        for group in range(start // GROUP, -(-min(stop, self.rows) // GROUP)):
            first = group * GROUP
            table = self._table.read_row_group(group)
            part = table.slice(max(start - first, 0), stop - max(start, first))
            yield from (Sample(**values) for values in part.to_pylist())

    def save(self, store: Store) -> None:
        """Keeps the index for the next start, and for the other processes."""
        if self._stored:
            return
        self._file.seek(0)
        with store.create(INDEX) as copy:
            shutil.copyfileobj(self._file, copy)


class PromptSource:
    """The prompt files of a data set, in their order, and the rules for their rows."""

    def __init__(
        self,
        paths: Sequence[str],
        rules: RowRules,
        kind: str | None = None,
        columns: Mapping[str, str] | None = None,
    ):
        """
        Args:
            paths: files and patterns of files; see `open_prompts`.
            kind: format of the files; by their endings if None.
            columns: known column -> its name in the files; "": do not use it.

        Raises:
            ValueError: there is no such file or column.
        """
        self._rules = rules
        self._names = {name: name for name in COLUMNS} | dict(columns or {})
        unknown = [name for name in self._names if name not in COLUMNS]
        if unknown:
            raise ValueError(f"--column {unknown[0]}: known are {', '.join(COLUMNS)}.")
        used = [name for name in self._names.values() if name]
        files = [path for pattern in paths for path in matching_files(pattern)]
        if not files:
            raise ValueError(f"no file matches {', '.join(paths)}.")
        self._files = [open_prompts(path, kind, used, self._names["prompt"]) for path in files]

    @functools.cached_property
    def key(self) -> str:
        """Hash of all that an index of these files depends on."""
        kinds = [getattr(file, "kind", None) for file in self._files]
        values = [self._digests, kinds, self._names, dataclasses.asdict(self._rules)]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def _digests(self) -> list[str]:
        return [file.digest() for file in self._files]

    def index(self, store: Store, progress: bool = False) -> PromptIndex:
        """The index of an earlier start if it is of the same files and rules, or else a new one."""
        try:
            index = PromptIndex(store.open(INDEX), stored=True)
            if index.summary.key == self.key:
                return index
        except (FileNotFoundError, NotADirectoryError, ValueError):
            pass
        return self.scan(progress)

    def scan(self, progress: bool = False) -> PromptIndex:
        """Reads all files."""
        counts, hashes, tasks, sizes, examples = [], array("q"), set(), {}, []
        columns, faults = {}, 0

        def checked() -> Iterator[Sample]:
            nonlocal faults
            for number, file in enumerate(self._files):
                first = len(hashes)
                rows = tqdm(
                    file.rows(),
                    desc="reading prompts",
                    unit="row",
                    disable=not progress,
                    leave=False,
                )
                for line, values in rows:
                    row = self._row(values, number, line, len(hashes))
                    if row.fault is None:
                        hashes.append(hash(row.id))
                        size = (row.width, row.height)
                        sizes[size] = sizes.get(size, 0) + 1
                        tasks.add(row.operation)
                    else:
                        hashes.append(hash((len(hashes), "bad")))
                        faults += 1
                        if len(examples) < SHOWN_FAULTS:
                            examples.append(row.fault)
                    if isinstance(values, dict) and len(columns) < 1000:
                        columns.update(dict.fromkeys(values))
                    yield row
                counts.append(len(hashes) - first)

        def summary(duplicates: Mapping[int, Sample]) -> Summary:
            files = [
                {"name": _last(file.path), "sha256": digest, "rows": rows}
                for file, digest, rows in zip(self._files, self._digests, counts, strict=True)
            ]
            return Summary(
                self.key,
                files,
                [(*size, count) for size, count in sizes.items()],
                faults + len(duplicates),
                [*examples, *(row.fault for row in duplicates.values())][:SHOWN_FAULTS],
                self._unused(columns),
                sorted(tasks),
            )

        index = _written(checked(), lambda: summary({}))
        duplicates = self._duplicates(index, np.frombuffer(hashes, np.int64), counts)
        if not duplicates:
            return index
        rows = (duplicates.get(row.index, row) for row in index.read(0, index.rows))
        return _written(rows, lambda: summary(duplicates))

    def _row(self, values: RowValues, file: int, line: int, number: int) -> Sample:
        """A row of a file as a sample, with the fault that it has."""
        default_id = self._default_id(file, line)
        if isinstance(values, str):
            fault = values
        else:
            known = {}
            for name, theirs in self._names.items():
                if theirs and values.get(theirs) is not None:
                    known[name] = values[theirs]
            try:
                return self._rules.sample(known, default_id, number, line)
            except ValueError as error:
                fault = str(error)
                if "prompt" not in known and self._names["prompt"] not in values:
                    keys = ", ".join(map(str, values))[:200]
                    fault = f"has no {self._names['prompt']!r} (it has: {keys})"
        fault = printable(f"{self._where(file, line)}: {fault}")
        return Sample(number, default_id, line, fault=fault)

    def _default_id(self, file: int, line: int) -> str:
        return f"{line:09d}" if len(self._files) == 1 else f"{file:04d}-{line:09d}"

    def _where(self, file: int, line: int) -> str:
        return f"{_last(self._files[file].path)}, line {line}"

    def _unused(self, columns: Mapping[str, Any]) -> list[str]:
        """Columns that are not used; refused where they look like misspelt ones."""
        unused = [printable(str(name)) for name in columns if name not in self._names.values()]
        free = [name for name, theirs in self._names.items() if theirs == name != "prompt"]
        free = [name for name in free if name not in columns]
        for name in unused:
            near = difflib.get_close_matches(name.lower(), free, n=1, cutoff=0.85)
            if near:
                raise ValueError(
                    f"the prompts have a column {name!r}: if {near[0]!r} is meant, use --column "
                    f"{near[0]}={name}; if not, --column {near[0]}=."
                )
        return unused

    def _duplicates(
        self, index: PromptIndex, hashes: np.ndarray, counts: Sequence[int]
    ) -> dict[int, Sample]:
        """Rows with the id of an earlier one, as bad rows. Hashes find the few to be compared."""
        order = np.argsort(hashes, kind="stable")
        equal = hashes[order][1:] == hashes[order][:-1]
        doubtful = sorted({*order[1:][equal].tolist(), *order[:-1][equal].tolist()})
        ends, places, duplicates = np.cumsum(counts), {}, {}
        for number in doubtful:
            (row,) = index.read(number, number + 1)
            file = int(np.searchsorted(ends, number, "right"))
            where = self._where(file, row.line)
            if row.fault is None and places.setdefault(row.id, where) != where:
                fault = f"{where}: has the id {row.id[:80]!r} of {places[row.id]}"
                default_id = self._default_id(file, row.line)
                duplicates[number] = Sample(number, default_id, row.line, fault=fault)
        return duplicates


def spool(stream: BinaryIO, store: Store, kind: str) -> str:
    """Keeps what comes through a pipe in the data set's folder, where a restart finds it.

    Returns:
        Its name there.

    Raises:
        ValueError: the folder has another content of that name already.
    """
    name = f"prompts.{kind}"
    with tempfile.NamedTemporaryFile() as copy:
        shutil.copyfileobj(stream, copy)
        copy.flush()
        if store.exists(name):
            if file_digest(f"{store}/{name}") != file_digest(copy.name):
                raise ValueError(
                    f"standard input differs from {store}/{name}: take another folder."
                )
            return name
        copy.seek(0)
        with store.create(name) as file:
            shutil.copyfileobj(copy, file)
    return name


def _written(rows: Iterator[Sample], summary) -> PromptIndex:
    """An index of rows in a temporary file. `summary` is called after the last row."""
    file = tempfile.TemporaryFile()
    with pq.ParquetWriter(
        file, _SCHEMA, compression="zstd", write_statistics=False, write_page_checksum=True
    ) as writer:
        group = []
        for row in rows:
            group.append(row)
            if len(group) == GROUP:
                writer.write_table(_table(group))
                group.clear()
        if group:
            writer.write_table(_table(group))
        writer.add_key_value_metadata({_KEY.decode(): json.dumps(dataclasses.asdict(summary()))})
    return PromptIndex(file)


def _table(rows: Sequence[Sample]) -> pa.Table:
    return pa.table({n: [getattr(row, n) for row in rows] for n in _SCHEMA.names}, _SCHEMA)


def _last(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]
