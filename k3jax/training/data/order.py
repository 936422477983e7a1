# SPDX-License-Identifier: Apache-2.0
"""The samples of batch k: a pure function of a few numbers, without state.

Each bucket is an endless stream of its samples, in a new order every epoch, and its batches are
equal parts of that stream. So the remainder of an epoch is not dropped: it begins the first batch
of the next epoch. In a bucket with fewer samples than a batch, a batch has some of them several
times.
"""

import threading
import zlib
from collections import OrderedDict
from typing import Any

import numpy as np


KEPT_PERMUTATIONS = 2  # per bucket: a batch may be part of two epochs


class Order:
    """The order of batches. Every batch is of one bucket; large buckets have more batches."""

    def __init__(self, bucket_of: np.ndarray, batch_size: int, seed: int, shuffle: bool = True):
        """
        Args:
            bucket_of: int (n,), the bucket of each sample.
            batch_size: samples in a batch, over all processes.
            shuffle: False: the order of the source, buckets evenly mixed.

        Raises:
            ValueError: there are no samples, or a number is out of range.
        """
        if not len(bucket_of):
            raise ValueError("there are no samples to make batches of.")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be 1 or more.")
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must be 0 or more.")
        self.bucket_of = np.asarray(bucket_of, np.int32)
        self.batch_size, self.seed, self.shuffle = int(batch_size), int(seed), bool(shuffle)
        by_bucket = np.argsort(self.bucket_of, kind="stable").astype(np.int32)
        self._sizes = np.bincount(self.bucket_of)
        self._members = np.split(by_bucket, np.cumsum(self._sizes)[:-1])
        self._permutations: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self):  # for worker processes; a lock cannot be pickled
        return Order, (self.bucket_of, self.batch_size, self.seed, self.shuffle)

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.bucket_of)

    def batch(self, number: int) -> np.ndarray:
        """int (batch_size,): the samples of batch `number`."""
        epoch = self.epoch_of(number)
        with self._lock:
            buckets, parts = self._epoch(epoch)
            place = number - self._batches_before(epoch)
            bucket = int(buckets[place])
            size, members = int(self._sizes[bucket]), self._members[bucket]
            stream = int(parts[place]) * self.batch_size + np.arange(self.batch_size)
            of_epoch, at = np.divmod(stream, size)
            for e in range(of_epoch[0], of_epoch[-1] + 1):
                within = of_epoch == e
                at[within] = self._permutation(bucket, e)[at[within]]
        return members[at]

    def epoch_of(self, number: int) -> int:
        """The epoch of batch `number`."""
        if number < 0:
            raise ValueError(f"there is no batch {number}; the first is 0.")
        least = number * self.batch_size // len(self)
        most = (number + 1 + len(self._sizes)) * self.batch_size // len(self) + 1
        while most - least > 1:  # the last epoch with no more than `number` batches before it
            middle = (least + most) // 2
            least, most = (
                (middle, most) if self._batches_before(middle) <= number else (least, middle)
            )
        return least

    def describe(self) -> dict[str, Any]:
        """Everything that the order depends on, for JSON."""
        return {
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "num_samples": len(self),
            "buckets": zlib.crc32(self.bucket_of.tobytes()),
        }

    def _batches_before(self, epoch: int) -> int:
        return sum(epoch * int(size) // self.batch_size for size in self._sizes)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The bucket of each batch of an epoch, and the number of its part of the stream."""
        if epoch not in self._epochs:
            first = [epoch * int(size) // self.batch_size for size in self._sizes]
            last = [(epoch + 1) * int(size) // self.batch_size for size in self._sizes]
            counts = [b - a for a, b in zip(first, last, strict=True)]
            buckets = np.repeat(np.arange(len(counts)), counts)
            parts = np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])
            if self.shuffle:
                order = _permutation(len(buckets), self.seed, epoch)
            else:
                even = [(np.arange(count) + 0.5) / count for count in counts]
                order = np.argsort(np.concatenate(even), kind="stable")
            _keep(self._epochs, epoch, (buckets[order], parts[order]), 2)
        return self._epochs[epoch]

    def _permutation(self, bucket: int, epoch: int) -> np.ndarray:
        size = int(self._sizes[bucket])
        if not self.shuffle:
            return np.arange(size)
        key = bucket, int(epoch)
        if key not in self._permutations:
            order = _permutation(size, self.seed, int(epoch), bucket)
            _keep(self._permutations, key, order, KEPT_PERMUTATIONS * len(self._sizes))
        return self._permutations[key]


def hold_out(num_samples: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample numbers for training, and `count` others for validation; both sorted."""
    if not 0 <= count < num_samples:
        raise ValueError(f"{count} of {num_samples} samples cannot be held out.")
    chosen = np.zeros(num_samples, bool)
    chosen[_permutation(num_samples, seed)[:count]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def _keep(cache: OrderedDict, key, value, most: int) -> None:
    cache[key] = value
    while len(cache) > most:
        cache.popitem(last=False)


def _permutation(size: int, *words: int) -> np.ndarray:
    """A random permutation that depends on `words` only.

    From raw bits, which NumPy promises to keep the same in every version; it promises nothing about
    `Generator.permutation`.
    """
    bits = np.random.Philox(np.random.SeedSequence(words)).random_raw(size)
    return np.argsort(bits, kind="stable").astype(np.int32)
