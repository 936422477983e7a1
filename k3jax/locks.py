# SPDX-License-Identifier: Apache-2.0
"""Byte-range locks in an empty file, by which the processes that share a folder keep apart.

A lock ends with its process, however that ends, so there is nothing to clean up and no clock to
trust. A process that it starts does not inherit it.
"""

import fcntl
import os


class LockFile:
    """Locks on the bytes of one file, held by this process until `close`.

    A process opens a lock file once: closing any other descriptor of it would end all its locks.
    """

    def __init__(self, path: str | os.PathLike):
        self._file: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)

    @property
    def work(self) -> bool:
        """Whether the file system has locks; known after the first was asked for."""
        return self._file is not None

    def take(self, byte: int = 0) -> bool:
        """Locks a byte; whether it was free, or the file system has no locks."""
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
