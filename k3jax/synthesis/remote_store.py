# SPDX-License-Identifier: Apache-2.0
"""A data set in a bucket, or wherever fsspec leads.

An object is written on this machine and put in one piece: it appears whole or not at all.
"""

import contextlib
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from k3jax.synthesis.files import PART, driver_named, explained, fsspec_module


class RemoteStore:
    """A data set in a bucket, or wherever fsspec leads."""

    def __init__(self, path: str):
        with driver_named(path):
            self.files, self.root = fsspec_module().core.url_to_fs(path.rstrip("/"))
        self._path = path.rstrip("/")

    def __str__(self) -> str:
        return self._path

    def discard_parts(self) -> None:
        """Nothing to be removed: parts are in temporary files of this machine."""

    def prepare(self) -> None:
        """Tries to write, and makes no folder: a bucket has none."""
        name = f".{secrets.token_hex(6)}{PART}"
        with explained(self._path):
            self.files.makedirs(self.root, exist_ok=True)
            self.files.pipe_file(f"{self.root}/{name}", b"k3jax")
            self.files.rm_file(f"{self.root}/{name}")

    def exists(self, name: str) -> bool:
        return self.files.exists(f"{self.root}/{name}")

    def size(self, name: str) -> int | None:
        try:
            return self.files.info(f"{self.root}/{name}")["size"]
        except FileNotFoundError:
            return None

    def names(self, folder: str) -> list[str]:
        self.files.invalidate_cache()  # other processes write here too
        try:
            paths = self.files.ls(f"{self.root}/{folder}", detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in paths)

    def open(self, name: str) -> BinaryIO:
        return self.files.open(f"{self.root}/{name}", "rb")

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """As `LocalStore.create`; the file is put when it is complete."""
        path = f"{self.root}/{name}"
        with tempfile.NamedTemporaryFile() as file, explained(f"{self._path}/{name}"):
            yield file
            file.flush()
            self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
            self.files.put_file(file.name, path)

    @contextlib.contextmanager
    def create_folder(self, name: str) -> Iterator[Path]:
        """The files of a folder, put one by one: a bucket knows no folder that appears at once."""
        with tempfile.TemporaryDirectory() as folder, explained(f"{self._path}/{name}"):
            yield Path(folder)
            self.delete(name)
            self.files.makedirs(f"{self.root}/{name}", exist_ok=True)
            for file in sorted(Path(folder).iterdir()):
                self.files.put_file(str(file), f"{self.root}/{name}/{file.name}")

    def create_new(self, name: str, content: bytes) -> bool:
        """As `LocalStore.create_new`, but two that ask at the same moment may both write."""
        if self.exists(name):
            return False
        with self.create(name) as file:
            file.write(content)
        return True

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), explained(f"{self._path}/{name}"):
            self.files.rm(f"{self.root}/{name}", recursive=True)
