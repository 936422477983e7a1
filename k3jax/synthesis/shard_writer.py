# SPDX-License-Identifier: Apache-2.0
"""Shards between the devices and the disk, written one after the other by a thread."""

import contextlib
import queue
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from k3jax.synthesis.image_formats import EncodedImage
from k3jax.synthesis.input_images import InputImages
from k3jax.synthesis.metadata import (
    FAILED,
    Result,
    Sidecar,
    columns_of,
    record_of,
    row_of,
    shard_columns,
    write_sidecar,
)
from k3jax.synthesis.phases import EncodedShard
from k3jax.synthesis.progress import Progress
from k3jax.synthesis.run_manifest import RunManifest
from k3jax.synthesis.samples import Sample
from k3jax.synthesis.shard_formats import create_shard
from k3jax.synthesis.store import Locks, Store


WAITING_BYTES = 1 << 30  # of pixels between the devices and the writer

_END, _ABANDON = object(), object()


class AbandonedError(Exception):
    """A shard that will not be finished now."""


class OpenShard:
    """A shard that the devices fill and the writer empties."""

    def __init__(self, encoded: EncodedShard, slots: threading.BoundedSemaphore):
        self.encoded, self.number = encoded, encoded.batches.shard
        self.ended = False
        self._slots = slots
        self._items: queue.SimpleQueue = queue.SimpleQueue()

    def put(self, sample: Sample, inputs: InputImages | None, image: Future[EncodedImage]) -> None:
        """Passes an image on; waits while too many have not been written."""
        self._slots.acquire()
        self._items.put((sample, inputs, image))

    def end(self, complete: bool) -> None:
        """No more images follow."""
        self._items.put(_END if complete else _ABANDON)

    def take(self) -> tuple[Sample, InputImages | None, EncodedImage] | None:
        """Waits for the next image; None after the last.

        Raises:
            AbandonedError: no more follow, and some are missing.
        """
        item = self._items.get()
        if item is _ABANDON or item is _END:
            self.ended = True
            if item is _ABANDON:
                raise AbandonedError
            return None
        sample, inputs, future = item
        try:
            return sample, inputs, future.result()
        finally:
            self._slots.release()


class ShardWriter:
    """Writes shards and sidecars in a thread that runs `write_all`.

    Attributes:
        error: the first that occurred; shards after it are taken but not written.
    """

    error: BaseException | None = None

    def __init__(
        self,
        store: Store,
        manifest: RunManifest,
        made_on: Mapping[str, Any],
        progress: Progress,
        locks: Locks,
    ):
        """
        Args:
            made_on: see `Sidecar`; filled in before the first shard is begun.
        """
        self._store, self._manifest, self._made_on = store, manifest, made_on
        self._progress, self._locks = progress, locks
        self._columns, self._shard_columns = columns_of(manifest), shard_columns(manifest)
        self._shards: queue.SimpleQueue[OpenShard | None] = queue.SimpleQueue()
        pixels = 12 * manifest.settings.width * manifest.settings.height
        self._slots = threading.BoundedSemaphore(max(16, min(512, WAITING_BYTES // pixels)))

    def begin(self, encoded: EncodedShard) -> OpenShard:
        """The next shard."""
        shard = OpenShard(encoded, self._slots)
        self._shards.put(shard)
        return shard

    def close(self) -> None:
        """No more shards follow."""
        self._shards.put(None)

    def write_all(self) -> None:
        """The writer's thread."""
        while (shard := self._shards.get()) is not None:
            try:
                if self.error is None:
                    self._write(shard)
            except AbandonedError:
                pass
            except BaseException as error:
                self.error = self.error or error
            # The devices must not wait for ever for a slot that nobody frees.
            while not shard.ended:
                with contextlib.suppress(BaseException):
                    shard.take()
            self._locks.release_shard(shard.number)

    def _write(self, shard: OpenShard) -> None:
        manifest, number = self._manifest, shard.number
        layout, extension = manifest.layout, manifest.settings.encoding.extension
        name, sidecar = layout.data(number), layout.sidecar(number)
        start, rows = time.monotonic(), {}

        def add(sample, image, inputs=None) -> dict[str, Any]:
            embeddings = shard.encoded.embeddings
            result = Result(sample, image, manifest.settings.sampler, embeddings, inputs)
            rows[sample.index] = row_of(result, self._columns)
            self._progress.sample(image.fault is not None)
            return rows[sample.index]

        columns = self._shard_columns
        with create_shard(self._store, name, layout.format, columns) as (writer, digest):
            for sample, inputs, image in iter(shard.take, None):
                row = add(sample, image, inputs)
                if image.fault is None:
                    writer.add(row["key"], extension, image.content, record_of(row, columns))
            # While a shard is replaced, its old sidecar must not call it finished.
            self._store.delete(sidecar)
        for sample in shard.encoded.batches.samples:
            if sample.fault is not None:
                add(sample, EncodedImage(None, None, sample.fault))
        values = [rows[index] for index in sorted(rows)]
        run = manifest.fingerprint
        note = Sidecar(values, number, run, digest.size, digest.sha256, self._made_on)
        write_sidecar(self._store, sidecar, note, self._columns)
        failed = sum(row["status"] == FAILED for row in values)
        self._progress.shard(name, len(values) - failed, failed, time.monotonic() - start)
