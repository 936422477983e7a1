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
from collections import Counter
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
        writer, hashes, files = _IndexWriter(), array("q"), []
        sizes, tasks, columns, faults, examples = Counter(), set(), {}, 0, []
        bar = {"desc": "reading prompts", "unit": "row", "leave": False, "disable": not progress}
        for number, file in enumerate(self._files):
            first = len(hashes)
            for line, values in tqdm(file.rows(), **bar):
                row = self._row(values, number, line, len(hashes))
                writer.add(row)
                if row.fault is None:
                    hashes.append(hash(row.id))
                    sizes[row.width, row.height] += 1
                    tasks.add(row.operation)
                else:
                    hashes.append(hash((len(hashes), "bad")))
                    faults += 1
                    examples += [row.fault] if len(examples) < SHOWN_FAULTS else []
                if isinstance(values, dict) and len(columns) < 1000:
                    columns.update(dict.fromkeys(values))
            rows, digest = len(hashes) - first, self._digests[number]
            files.append({"name": _last(file.path), "sha256": digest, "rows": rows})
        areas = [(*size, count) for size, count in sizes.items()]
        unused = self._unused(columns)
        summary = Summary(self.key, files, areas, faults, examples, unused, sorted(tasks))
        index = writer.finish(summary)
        duplicates = self._duplicates(index, np.frombuffer(hashes, np.int64))
        if not duplicates:
            return index
        writer = _IndexWriter()
        for row in index.read(0, index.rows):
            writer.add(duplicates.get(row.index, row))
        examples = [*examples, *(row.fault for row in duplicates.values())][:SHOWN_FAULTS]
        faults += len(duplicates)
        return writer.finish(dataclasses.replace(summary, faults=faults, examples=examples))

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

    def _duplicates(self, index: PromptIndex, hashes: np.ndarray) -> dict[int, Sample]:
        """Rows with the id of an earlier one, as bad rows. Hashes find the few to be compared."""
        values, counts = np.unique(hashes, return_counts=True)
        doubtful = set(np.flatnonzero(np.isin(hashes, values[counts > 1])).tolist())
        ends = np.cumsum([file["rows"] for file in index.summary.files])
        places, duplicates = {}, {}
        for row in index.read(0, index.rows) if doubtful else ():
            if row.index not in doubtful or row.fault is not None:
                continue
            file = int(np.searchsorted(ends, row.index, "right"))
            where = self._where(file, row.line)
            if places.setdefault(row.id, where) != where:
                fault = printable(f"{where}: has the id {row.id[:80]!r} of {places[row.id]}")
                default_id = self._default_id(file, row.line)
                duplicates[row.index] = Sample(row.index, default_id, row.line, fault=fault)
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


class _IndexWriter:
    """Writes an index into a temporary file."""

    def __init__(self):
        self._file, self._rows = tempfile.TemporaryFile(), []
        options = {"write_statistics": False, "write_page_checksum": True}
        self._writer = pq.ParquetWriter(self._file, _SCHEMA, compression="zstd", **options)

    def add(self, row: Sample) -> None:
        self._rows.append(row)
        if len(self._rows) == GROUP:
            self._flush()

    def finish(self, summary: Summary) -> PromptIndex:
        if self._rows:
            self._flush()
        note = json.dumps(dataclasses.asdict(summary))
        self._writer.add_key_value_metadata({_KEY.decode(): note})
        self._writer.close()
        return PromptIndex(self._file)

    def _flush(self) -> None:
        columns = {n: [getattr(row, n) for row in self._rows] for n in _SCHEMA.names}
        self._writer.write_table(pa.table(columns, _SCHEMA))
        self._rows.clear()


def _last(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]
