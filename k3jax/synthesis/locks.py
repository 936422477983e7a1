# SPDX-License-Identifier: Apache-2.0
"""Who works on what: byte-range locks in one empty file of the data set's folder.

A lock ends with its process, however that ends, so there is nothing to clean up and no clock to
trust. Where the file system has no locks, or is a bucket, two processes that make the same shard
write the same bytes, and the later one replaces the earlier's file whole.
"""

import fcntl
import os

from k3jax.synthesis.local_store import LocalStore
from k3jax.synthesis.storage import Store


LOCK_FILE = ".lock"
_SHARES = 1 << 40  # shards lock the bytes below, shares of the work those from here on


class Locks:
    """Locks that this process holds until `close`."""

    def __init__(self, store: Store):
        self._file = None
        if isinstance(store, LocalStore):
            # Only one descriptor a process: closing any other would end all locks.
            self._file = os.open(store.root / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)

    @property
    def work(self) -> bool:
        """Whether the file system has locks; known after the first was asked for."""
        return self._file is not None

    def share(self, worker: int, workers: int) -> bool:
        """Takes a share of the work; whether it was free."""
        return self._take(_SHARES + workers * (1 << 20) + worker)

    def shard(self, shard: int) -> bool:
        """Takes a shard; whether it was free."""
        return self._take(shard)

    def release_shard(self, shard: int) -> None:
        if self._file is not None:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, shard)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _take(self, byte: int) -> bool:
        if self._file is None:
            return True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:
            os.close(self._file)
            self._file = None
        return True
