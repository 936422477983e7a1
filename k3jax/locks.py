# SPDX-License-Identifier: Apache-2.0
"""Locks that keep processes apart that share a folder.

A lock ends with its process, however that ends: nothing has to be cleaned up and no clock is
trusted. A process that it starts does not inherit it. Where a file system has no locks, a lock
counts as free.
"""

import fcntl
import os
from pathlib import Path


class LockFile:
    """Locks on the bytes of one empty file, held by this process until `close`.

    A process must open a lock file once: closing any other descriptor of it ends all its locks.
    """

    def __init__(self, path: str | os.PathLike):
        self._file: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)

    @property
    def work(self) -> bool:
        """Whether the file system has locks; known after the first call of `take`."""
        return self._file is not None

    def take(self, byte: int = 0) -> bool:
        """Locks a byte; True if it was free, or the file system has no locks."""
        if self._file is None:
            return True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:
            self.close()
        return True

    def release(self, byte: int = 0) -> None:
        if self._file is not None:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, byte)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class FolderLock:
    """A lock on a folder itself, which needs no file in it, held by this object until `close`."""

    def __init__(self, folder: str | os.PathLike):
        self._folder: int = os.open(Path(folder), os.O_RDONLY)

    def take(self) -> bool | None:
        """True if the folder was free; None where the file system has no locks."""
        try:
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return None
        return True

    def close(self) -> None:
        os.close(self._folder)
