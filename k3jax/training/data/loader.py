# SPDX-License-Identifier: Apache-2.0
"""Endless batches in a fixed order, read ahead by grain, with a position that can be restored."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

from k3jax.training.data.buckets import MULTIPLE, BucketIndex, bucket_index, read_image
from k3jax.training.data.order import Order
from k3jax.training.data.source import Source
from k3jax.training.train_config import DataConfig


ENDLESS = 2**40  # positions; grain needs a length
MAX_THREADS = 16


class BatchIterator(ABC):
    """Batches in an `Order`: the rows of one process. Iterate, then `close()`, or use `with`.

    Batch k does not depend on `num_workers`, nor on the number of processes that share its rows.
    """

    def __init__(self, order: Order, process_index: int, process_count: int):
        if order.batch_size % process_count:
            raise ValueError(
                f"batch_size is {order.batch_size}, which {process_count} processes cannot share "
                f"evenly: choose a multiple of {process_count}."
            )
        self.order = order
        self._rows = order.batch_size // process_count
        self._first = process_index * self._rows
        self._number = 0
        self._iterator = None

    @abstractmethod
    def batch(self, number: int) -> dict[str, Any]:
        """Batch `number`, read now; for validation, which uses the same ones each time."""

    @abstractmethod
    def _dataset(self, number: int):
        """A grain IterDataset of the batches from `number` on."""

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, Any]:
        if self._iterator is None:
            self._iterator = iter(self._dataset(self._number))
        try:
            batch = next(self._iterator)
        except BaseException:
            self.close()  # the position is still that of the failed batch
            raise
        self._number += 1
        return batch

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self.order.epoch_of(self._number)

    def state(self) -> dict[str, Any]:
        """The position after the batches returned so far, for JSON."""
        return {"batch": self._number, **self.order.describe()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues after the last batch before `state()` was called.

        Raises:
            ValueError: the state is of another order of samples.
        """
        for name, here in self.order.describe().items():
            there = state.get(name)
            if there != here:
                raise ValueError(
                    f"the position in the data was saved with {name} {there}, and this run has "
                    f"{here}: resume with the same data and settings, or begin a new run."
                )
        self.close()
        self._number = int(state["batch"])

    def close(self) -> None:
        """Ends the threads and processes that read ahead; keeps the position."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            iterator.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _samples(self, number: int) -> np.ndarray:
        """This process's samples of batch `number`."""
        return self.order.batch(number)[self._first : self._first + self._rows]


class Loader(BatchIterator):
    """Batches of images and captions.

    A batch is a dict of images uint8 (b, h, w, 3), captions and keys (lists of b strings); b is the
    batch size over the process count, and h, w are those of one bucket.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        *,
        samples: np.ndarray | None = None,
        index: BucketIndex | None = None,
        multiple: int = MULTIPLE,
    ):
        """
        Args:
            batch_size: samples over all processes.
            samples: numbers of the samples that are used; None: all.
            index: of the source, if it is known.
            multiple: of the buckets' sides.

        Raises:
            ValueError: an image has no readable header, or a number is out of range.
        """
        self.index = bucket_index(source, config, multiple) if index is None else index
        samples = np.arange(len(source)) if samples is None else np.asarray(samples)
        order = Order(self.index.bucket_of[samples], batch_size, seed, config.shuffle)
        super().__init__(order, process_index, process_count)
        self._source, self._used, self._num_workers = source, samples, config.num_workers

    def batch(self, number: int) -> dict[str, Any]:
        read = _Position(self, 0)
        first = number * self._rows
        return stack([read(position) for position in range(first, first + self._rows)])

    def _dataset(self, number: int):
        read = _Position(self, number * self._rows)
        return read_ahead(read, ENDLESS, self._rows, self._num_workers)


class _Position:
    """Position in this process's endless sequence of samples -> the decoded sample."""

    def __init__(self, loader: Loader, first: int):
        self._source, self._index, self._used = loader._source, loader.index, loader._used
        self._order, self._rows, self._row = loader.order, loader._rows, loader._first
        self._start = first

    def __call__(self, position: int) -> dict[str, Any]:
        number, row = divmod(self._start + position, self._rows)
        sample = self._used[self._order.batch(number)[self._row + row]]
        return read_image(self._source, self._index, int(sample))


def read_ahead(
    read: Callable[[int], dict[str, Any]], count: int, batch_size: int, num_workers: int
):
    """A grain IterDataset of `read(0)`, `read(1)`, ..., stacked `batch_size` at a time, in order.

    Threads read (Pillow decodes without the GIL), or `num_workers` processes with threads of their
    own. Another thread stacks the batches, so that the caller only fetches them.
    """
    grain = import_grain()
    from absl import flags

    threads = min(MAX_THREADS, max(2, os.cpu_count() or 2))
    ahead = max(2 * batch_size, threads)
    if num_workers:
        if not flags.FLAGS.is_parsed():  # grain reads them before it starts a process
            flags.FLAGS.mark_as_parsed()
        threads, ahead = 2, max(2, ahead // num_workers)
    dataset = grain.MapDataset.range(count).map(read)
    dataset = dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    )
    if num_workers:
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=ahead)
        )
    dataset = dataset.batch(batch_size, batch_fn=stack)
    return grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=1)


def stack(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples of `read_image` as one batch."""
    return {
        "images": np.stack([sample["image"] for sample in samples]),
        "captions": [sample["caption"] for sample in samples],
        "keys": [sample["key"] for sample in samples],
    }


def import_grain():
    """The grain module, which only training needs."""
    try:
        import grain
    except ImportError:
        raise ImportError("reading training data needs grain: pip install 'k3jax[train]'") from None
    return grain
