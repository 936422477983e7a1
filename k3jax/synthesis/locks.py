# SPDX-License-Identifier: Apache-2.0
"""Who works on what: byte-range locks in one empty file of the data set's folder.

Where the file system has no locks, or is a bucket, two processes that make the same shard write the
same bytes, and the later one replaces the earlier's file whole.
"""

from k3jax.locks import LockFile
from k3jax.synthesis.local_store import LocalStore
from k3jax.synthesis.storage import Store


LOCK_FILE = ".lock"
_SHARES = 1 << 40  # shards lock the bytes below, shares of the work those from here on


class Locks:
    """Locks that this process holds until `close`."""

    def __init__(self, store: Store):
        local = isinstance(store, LocalStore)
        self._lock = LockFile(store.root / LOCK_FILE) if local else None

    @property
    def work(self) -> bool:
        """Whether the file system has locks; known after the first was asked for."""
        return self._lock is not None and self._lock.work

    def share(self, worker: int, workers: int) -> bool:
        """Takes a share of the work; whether it was free."""
        return self._take(_SHARES + workers * (1 << 20) + worker)

    def shard(self, shard: int) -> bool:
        """Takes a shard; whether it was free."""
        return self._take(shard)

    def release_shard(self, shard: int) -> None:
        if self._lock is not None:
            self._lock.release(shard)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def _take(self, byte: int) -> bool:
        return self._lock is None or self._lock.take(byte)
