# SPDX-License-Identifier: Apache-2.0
"""A data set in a local folder.

A file is written under another name in the same folder, synced and renamed: it appears whole or not
at all.
"""

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from k3jax.synthesis.files import PART, StorageError, explained


class LocalStore:
    """A data set in a local folder. Names are relative, with slashes."""

    def __init__(self, path: str):
        self.root = Path(os.path.abspath(os.path.expanduser(path)))
        self._parts: set[Path] = set()

    def __str__(self) -> str:
        return str(self.root)

    def discard_parts(self) -> None:
        """Removes what is being written, for a process that is about to end at once."""
        for part in list(self._parts):
            _remove(part)

    def prepare(self) -> None:
        """Makes the folder and tries to write into it."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise StorageError(f"{self.root} cannot be written: {error.strerror}.") from None

    def exists(self, name: str) -> bool:
        return (self.root / name).exists()

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        try:
            return (self.root / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def names(self, folder: str) -> list[str]:
        """What lies in a folder, sorted; nothing if it does not exist."""
        try:
            return sorted(os.listdir(self.root / folder))
        except FileNotFoundError:
            return []

    def open(self, name: str) -> BinaryIO:
        return open(self.root / name, "rb")

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """A file that gets its name when the body of the `with` has ended well.

        Raises:
            StorageError: it cannot be written, or the body raised an OSError.
        """
        path = self.root / name
        part = self._part(path)
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(part, "wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(part, path)
                _sync_folder(path.parent)
            finally:
                self._forget(part)

    @contextlib.contextmanager
    def create_folder(self, name: str) -> Iterator[Path]:
        """A folder to be filled with files, that gets its name when the body has ended well."""
        path = self.root / name
        part = self._part(path)
        with explained(path):
            try:
                part.mkdir(parents=True)
                yield part
                for file in part.iterdir():
                    descriptor = os.open(file, os.O_RDONLY)
                    os.fsync(descriptor)
                    os.close(descriptor)
                _sync_folder(part)
                if path.exists():  # of a damaged shard: a folder does not replace a full one
                    os.replace(path, old := self._part(path))
                    self._forget(old)
                os.replace(part, path)
                _sync_folder(path.parent)
            finally:
                self._forget(part)

    def create_new(self, name: str, content: bytes) -> bool:
        """Writes a file, whole, unless it exists; whether this process wrote it."""
        path = self.root / name
        part = self._part(path)
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(part, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                return _named_if_new(part, path)
            finally:
                self._forget(part)

    def delete(self, name: str) -> None:
        _remove(self.root / name)

    def _part(self, path: Path) -> Path:
        part = path.with_name(f".{path.name}.{secrets.token_hex(6)}{PART}")
        self._parts.add(part)
        return part

    def _forget(self, part: Path) -> None:
        with contextlib.suppress(OSError):
            _remove(part)
        self._parts.discard(part)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _named_if_new(part: Path, path: Path) -> bool:
    """Gives a file its name unless that is taken."""
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


def _sync_folder(folder: Path) -> None:
    """A rename survives a power cut only when its folder is synced too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems have no such call
    finally:
        os.close(descriptor)
