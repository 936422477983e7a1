# SPDX-License-Identifier: Apache-2.0
"""Where a data set is stored: a local folder, or an address that fsspec knows (gs://, s3://, ...).

A file appears whole or not at all: a local one is written under another name in the same folder,
synced and renamed; an object is written on this machine and uploaded in one piece.
"""

import contextlib
import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import fsspec

from k3jax.locks import LockFile


LOCK_FILE = ".lock"
PART = ".part"
"""Ending of files that are being written."""


class StorageError(ValueError):
    """The data set cannot be written or read; one sentence for people."""


def is_remote(path: str) -> bool:
    return "://" in path


def open_file(path: str) -> BinaryIO:
    """A file at a path or address, to read from and seek in.

    Raises:
        ValueError: it does not exist, or cannot be opened.
    """
    try:
        if is_remote(path):
            with _missing_driver_named(path):
                return fsspec.open(path, "rb").open()
        return open(os.path.expanduser(path), "rb")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from None


def matching_files(pattern: str) -> list[str]:
    """The files that match a pattern, sorted; the pattern itself if it has no wildcard."""
    if not glob.has_magic(pattern):
        return [pattern]
    if is_remote(pattern):
        with _missing_driver_named(pattern):
            files, _ = fsspec.url_to_fs(pattern)
        return sorted(files.unstrip_protocol(path) for path in files.glob(pattern))
    return sorted(glob.glob(os.path.expanduser(pattern), recursive=True))


class Store:
    """The folder of a data set. Names in it are relative, with slashes."""

    def __init__(self, path: str):
        with _missing_driver_named(path):
            self._files, self._root = fsspec.url_to_fs(path.rstrip("/"))
        self._path = path.rstrip("/")

    def __str__(self) -> str:
        return self._path

    def exists(self, name: str) -> bool:
        return self._files.exists(f"{self._root}/{name}")

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        try:
            return self._files.size(f"{self._root}/{name}")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def names(self, folder: str) -> list[str]:
        """The names in a folder, sorted; empty if it does not exist."""
        self._files.invalidate_cache()  # other processes write here too
        try:
            paths = self._files.ls(f"{self._root}/{folder}", detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in paths)

    def open(self, name: str) -> BinaryIO:
        return self._files.open(f"{self._root}/{name}", "rb")

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def write(self, name: str, content: bytes) -> None:
        with self.create(name) as file:
            file.write(content)

    def delete(self, name: str) -> None:
        """Removes a file or folder, if there is one."""
        with contextlib.suppress(FileNotFoundError), write_errors_explained(f"{self}/{name}"):
            self._files.rm(f"{self._root}/{name}", recursive=True)

    def prepare(self) -> None:
        """Writes a file to see whether that works, and removes it."""
        name = f".{secrets.token_hex(6)}{PART}"
        with write_errors_explained(self._path):
            self._files.makedirs(self._root, exist_ok=True)
            self._files.pipe_file(f"{self._root}/{name}", b"k3jax")
            self._files.rm_file(f"{self._root}/{name}")

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """A file that gets its name when the body of the `with` has ended without an error.

        Raises:
            StorageError: it cannot be written, or the body raised an OSError.
        """
        path = f"{self._root}/{name}"
        with tempfile.NamedTemporaryFile() as file, write_errors_explained(f"{self}/{name}"):
            yield file
            file.flush()
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._files.put_file(file.name, path)

    @contextlib.contextmanager
    def create_folder(self, name: str) -> Iterator[Path]:
        """The same for a folder to be filled with files. Buckets get its files one by one."""
        with tempfile.TemporaryDirectory() as folder, write_errors_explained(f"{self}/{name}"):
            yield Path(folder)
            self.delete(name)
            self._files.makedirs(f"{self._root}/{name}", exist_ok=True)
            for file in sorted(Path(folder).iterdir()):
                self._files.put_file(str(file), f"{self._root}/{name}/{file.name}")

    def create_new(self, name: str, content: bytes) -> bool:
        """Writes a file unless it exists, and returns whether this call wrote it.

        In a bucket, two processes that call it at the same moment may both write.
        """
        if self.exists(name):
            return False
        self.write(name, content)
        return True

    def discard_parts(self) -> None:
        """Removes what is half-written in the folder, for a process that ends at once."""


class LocalStore(Store):
    """A data set in a local folder, whose files are renamed when they are complete."""

    def __init__(self, path: str):
        self.root = Path(os.path.abspath(os.path.expanduser(path)))
        self._files, self._root = fsspec.filesystem("file"), str(self.root)
        self._path = self._root
        self._parts: set[Path] = set()

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(os.listdir(self.root / folder))
        except FileNotFoundError:
            return []

    def prepare(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise StorageError(f"{self.root} cannot be written: {error.strerror}.") from None

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        path = self.root / name
        with self._part(path) as part:
            with _synced(part) as file:
                yield file
            os.replace(part, path)
            _sync_folder(path.parent)

    @contextlib.contextmanager
    def create_folder(self, name: str) -> Iterator[Path]:
        path = self.root / name
        with self._part(path) as part:
            part.mkdir()
            yield part
            for file in part.iterdir():
                with open(file, "rb") as opened:
                    os.fsync(opened)
            _sync_folder(part)
            if path.exists():  # of a damaged shard: a folder does not replace a full one
                with self._part(path) as old:
                    os.replace(path, old)
            os.replace(part, path)
            _sync_folder(path.parent)

    def create_new(self, name: str, content: bytes) -> bool:
        path = self.root / name
        with self._part(path) as part:
            with _synced(part) as file:
                file.write(content)
            try:
                os.link(part, path)  # unlike a rename, it never replaces
            except FileExistsError:
                return False
            except OSError:  # a file system without links
                if path.exists():
                    return False
                os.replace(part, path)
            _sync_folder(path.parent)
            return True

    def delete(self, name: str) -> None:
        _remove(self.root / name)

    def discard_parts(self) -> None:
        for part in list(self._parts):
            _remove(part)

    @contextlib.contextmanager
    def _part(self, path: Path) -> Iterator[Path]:
        """A name for `path` while it is being written, gone at the end."""
        part = path.with_name(f".{path.name}.{secrets.token_hex(6)}{PART}")
        self._parts.add(part)
        try:
            with write_errors_explained(path):
                part.parent.mkdir(parents=True, exist_ok=True)
                yield part
        finally:
            with contextlib.suppress(OSError):
                _remove(part)
            self._parts.discard(part)


def store_at(path: str) -> Store:
    return Store(path) if is_remote(path) else LocalStore(path)


class Locks:
    """Locks of this process on shards and on its share of the work, held until `close`.

    They are byte ranges of one empty file in the data set's folder. Where the file system has no
    locks, or is a bucket, two processes that make the same shard write the same bytes, and the
    later file replaces the earlier one.
    """

    _SHARES = 1 << 40  # shards lock the bytes below, shares of the work those from here on

    def __init__(self, store: Store):
        self._lock = LockFile(store.root / LOCK_FILE) if isinstance(store, LocalStore) else None

    @property
    def work(self) -> bool:
        """Whether the file system has locks; known after the first `take_...`."""
        return self._lock is not None and self._lock.work

    def take_share(self, worker: int, workers: int) -> bool:
        """Locks a share of the work, and returns whether it was free."""
        return self._take(self._SHARES + workers * (1 << 20) + worker)

    def take_shard(self, shard: int) -> bool:
        """Locks a shard, and returns whether it was free."""
        return self._take(shard)

    def release_shard(self, shard: int) -> None:
        if self._lock is not None:
            self._lock.release(shard)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def _take(self, byte: int) -> bool:
        return self._lock is None or self._lock.take(byte)


@contextlib.contextmanager
def write_errors_explained(path) -> Iterator[None]:
    """Turns an OSError of a write into a sentence that names the path."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error.strerror or error}. Finished shards are kept: "
            "solve this and run the same command again."
        ) from error


@contextlib.contextmanager
def _missing_driver_named(path: str) -> Iterator[None]:
    """Turns fsspec's error for a missing driver of an address into one that names the package."""
    try:
        yield
    except ModuleNotFoundError:
        raise
    except ImportError as error:
        if path.startswith(("gs://", "gcs://")):
            raise ModuleNotFoundError(str(error), name="gcsfs") from None
        raise ImportError(f"{path} cannot be opened: {error}") from None


@contextlib.contextmanager
def _synced(path: Path) -> Iterator[BinaryIO]:
    """A file to be written that is on the disk when the body ends."""
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """A rename survives a power cut only when its folder is synced too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems have no such call
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
