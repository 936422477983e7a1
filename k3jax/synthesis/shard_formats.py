# SPDX-License-Identifier: Apache-2.0
"""Shards in each format, written image by image and read back the same way.

    webdataset   USTAR archive: KEY.jpg and KEY.json for each sample
    parquet      a row per sample, the image embedded as Hugging Face `datasets` has it
    files        a folder: KEY.jpg, and metadata.jsonl as its ImageFolder reads it

Nothing in a shard depends on when, where or by whom it is written.
"""

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from k3jax.synthesis.metadata import Column
from k3jax.synthesis.run_manifest import Format
from k3jax.synthesis.store import Store


ROW_GROUP = 100  # images; what a writer holds in memory
METADATA_FILE = "metadata.jsonl"
IMAGE_FEATURE = {"_type": "Image"}
FEATURE_OF = {"double": "float64"}
"""Names of types where `datasets` has other ones than Arrow."""


@dataclass(frozen=True)
class StoredImage:
    """An image of a shard."""

    key: str
    content: bytes


class ShardFileWriter(Protocol):
    def add(self, key: str, extension: str, content: bytes, record: Mapping[str, Any]) -> None:
        """Appends a sample: its image and its record."""


@contextlib.contextmanager
def create_shard(
    store: Store, name: str, kind: Format, columns: Sequence[Column]
) -> Iterator[tuple[ShardFileWriter, "Digest"]]:
    """A shard that gets its name when the body of the `with` has ended without an error.

    Args:
        columns: see `shard_columns`.

    Yields:
        (writer, digest); the digest is complete when the `with` has been left.
    """
    digest = Digest()
    if kind == "files":
        with store.create_folder(name) as folder:
            writer = _FolderWriter(folder, digest)
            yield writer, digest
            writer.close()
        return
    with store.create(name) as file:
        target = _HashedFile(file, digest)
        writer = _TarWriter(target) if kind == "webdataset" else _ParquetWriter(target, columns)
        try:
            yield writer, digest
            writer.close()
        finally:
            target.end()


def read_shard(store: Store, name: str, kind: Format) -> Iterator[StoredImage]:
    """The images of a shard, in its order; whatever its reader raises where it is damaged."""
    if kind == "files":
        for file in store.names(name):
            if file != METADATA_FILE:
                with store.open(f"{name}/{file}") as opened:
                    yield StoredImage(file.split(".")[0], opened.read())
    elif kind == "webdataset":
        with store.open(name) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if not member.name.endswith(".json"):
                    content = archive.extractfile(member).read()
                    yield StoredImage(member.name.split(".")[0], content)
    else:
        with store.open(name) as file:
            table = pq.ParquetFile(file, page_checksum_verification=True)
            for batch in table.iter_batches(ROW_GROUP, columns=["image", "key"]):
                for row in batch.to_pylist():
                    yield StoredImage(row["key"], row["image"]["bytes"])


def shard_digest(store: Store, name: str, kind: Format) -> "Digest | None":
    """Size and hash of a shard as it is stored; None where it is missing."""
    digest = Digest()
    if kind == "files":
        names = store.names(name)
        if not names:
            return None
        for file in names:
            with store.open(f"{name}/{file}") as opened:
                digest.add_file(file, opened.read())
        return digest
    if store.size(name) is None:
        return None
    with store.open(name) as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest


class Digest:
    """Size and sha256 of a file; of a folder, sha256 over the names and hashes of its files."""

    def __init__(self):
        self.size, self._hash = 0, hashlib.sha256()
        self._files: dict[str, str] = {}

    def update(self, content, size: int | None = None) -> None:
        self.size += len(content) if size is None else size
        self._hash.update(content)

    def add_file(self, name: str, content: bytes) -> None:
        self.size += len(content)
        self._files[name] = hashlib.sha256(content).hexdigest()

    @property
    def sha256(self) -> str:
        if not self._files:
            return self._hash.hexdigest()
        lines = "".join(f"{name} {digest}\n" for name, digest in sorted(self._files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()


class _HashedFile(io.RawIOBase):
    """A file that is hashed as it is written, front to back."""

    def __init__(self, file: BinaryIO, digest: Digest):
        self._file, self._digest = file, digest

    def end(self) -> None:
        """Ignores what the writer of an abandoned shard still writes."""
        self._file = io.BytesIO()

    def writable(self) -> bool:
        return True

    def write(self, content) -> int:
        size = memoryview(content).nbytes
        self._file.write(content)
        self._digest.update(content, size)
        return size

    def tell(self) -> int:
        return self._digest.size

    def close(self) -> None:
        """Nothing: whoever created the file closes it."""


class _TarWriter:
    def __init__(self, file: _HashedFile):
        self._archive = tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)

    def add(self, key, extension, content, record):
        for ending, data in ((extension, content), ("json", _json(record))):
            # TarInfo's defaults have no owner and no time: ids and mtime are 0.
            member = tarfile.TarInfo(f"{key}.{ending}")
            member.size = len(data)
            self._archive.addfile(member, io.BytesIO(data))

    def close(self):
        self._archive.close()


class _FolderWriter:
    def __init__(self, folder: os.PathLike, digest: Digest):
        self._folder, self._digest = folder, digest
        self._lines: list[bytes] = []

    def add(self, key, extension, content, record):
        name = f"{key}.{extension}"
        self._write(name, content)
        self._lines.append(_json({"file_name": name, **record}))

    def close(self):
        self._write(METADATA_FILE, b"".join(line + b"\n" for line in self._lines))

    def _write(self, name, content):
        with open(os.path.join(self._folder, name), "wb") as file:
            file.write(content)
        self._digest.add_file(name, content)


class _ParquetWriter:
    def __init__(self, file: _HashedFile, columns: Sequence[Column]):
        self._file, self._writer, self._schema = file, None, parquet_schema(columns)
        self._rows: list[dict[str, Any]] = []

    def add(self, key, extension, content, record):
        image = {"bytes": content, "path": f"{key}.{extension}"}
        self._rows.append({"image": image, "key": key, **record})
        if len(self._rows) == ROW_GROUP:
            self._flush()

    def close(self):
        if self._rows or self._writer is None:
            self._flush()
        self._writer.close()

    def _flush(self):
        schema = self._schema
        others = [name for name in schema.names if name != "image"]
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._file,
                schema,
                # Images are compressed already, and none occurs twice.
                compression={name: "zstd" for name in others},
                use_dictionary=others,
                write_statistics=others,
                write_page_checksum=True,
                store_schema=True,
            )
        rows = [{name: row.get(name) for name in schema.names} for row in self._rows]
        self._writer.write_table(pa.Table.from_pylist(rows, schema), row_group_size=ROW_GROUP)
        self._rows.clear()


def parquet_schema(columns: Sequence[Column]) -> pa.Schema:
    """Columns of a Parquet shard, with the note by which `datasets` knows the image as one."""
    types = {"key": pa.string(), **{column.shard: _wide(column.type) for column in columns}}
    features = {"image": IMAGE_FEATURE} | {
        name: {"dtype": FEATURE_OF.get(str(type), str(type)), "_type": "Value"}
        for name, type in types.items()
    }
    note = json.dumps({"info": {"features": features}})
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.schema([("image", image), *types.items()], metadata={"huggingface": note})


def _wide(type: pa.DataType) -> pa.DataType:
    return pa.int64() if pa.types.is_integer(type) else type


def _json(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode()
