# SPDX-License-Identifier: Apache-2.0
"""Shards on their way from the devices to the disk, written one after the other by a thread."""

import contextlib
import queue
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from k3jax.synthesis.image_formats import Encoded
from k3jax.synthesis.input_images import Inputs
from k3jax.synthesis.phases import EncodedShard
from k3jax.synthesis.progress import Progress
from k3jax.synthesis.run_manifest import Manifest
from k3jax.synthesis.samples import Sample, key_of
from k3jax.synthesis.shard_formats import create_shard, record_of, record_types
from k3jax.synthesis.sidecar import FAILED, OK, Sidecar, write_sidecar
from k3jax.synthesis.store import Locks, Store


WAITING_BYTES = 1 << 30  # of pixels between the devices and the writer

_END, _ABANDON = object(), object()


class AbandonedError(Exception):
    """A shard that will not be finished now."""


class ShardInWork:
    """A shard that the devices fill and the writer empties."""

    def __init__(self, prepared: EncodedShard, slots: threading.BoundedSemaphore):
        self.prepared, self.number = prepared, prepared.plan.shard
        self.ended = False
        self._slots = slots
        self._items: queue.SimpleQueue = queue.SimpleQueue()

    def put(self, sample: Sample, inputs: Inputs | None, encoded: Future[Encoded]) -> None:
        """Hands an image over; waits while too many are under way."""
        self._slots.acquire()
        self._items.put((sample, inputs, encoded))

    def end(self, complete: bool) -> None:
        """There will be no more."""
        self._items.put(_END if complete else _ABANDON)

    def take(self) -> tuple[Sample, Inputs | None, Encoded] | None:
        """The next image, waited for; None behind the last.

        Raises:
            AbandonedError: there will be no more, and some are missing.
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
        error: the first that came; the shards after it are taken but not written.
    """

    error: BaseException | None = None

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        made_on: Mapping[str, Any],
        progress: Progress,
        locks: Locks,
    ):
        """
        Args:
            made_on: see `Sidecar`; filled in when the first shard is begun.
        """
        self._store, self._manifest, self._made_on = store, manifest, made_on
        self._progress, self._locks = progress, locks
        self._layout, self._encoding = manifest.layout, manifest.settings.encoding
        self._types = record_types(manifest.prompts["tasks"])
        self._shards: queue.SimpleQueue[ShardInWork | None] = queue.SimpleQueue()
        pixels = 12 * manifest.settings.width * manifest.settings.height
        self._slots = threading.BoundedSemaphore(max(16, min(512, WAITING_BYTES // pixels)))

    def begin(self, prepared: EncodedShard) -> ShardInWork:
        """The next shard."""
        shard = ShardInWork(prepared, self._slots)
        self._shards.put(shard)
        return shard

    def close(self) -> None:
        """There are no more shards."""
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
            # The devices must not wait for ever for a place that nobody frees.
            while not shard.ended:
                with contextlib.suppress(BaseException):
                    shard.take()
            self._locks.release_shard(shard.number)

    def _write(self, shard: ShardInWork) -> None:
        layout, number, types = self._layout, shard.number, self._types
        name, sidecar = layout.data(number), layout.sidecar(number)
        start, rows = time.monotonic(), {}
        with create_shard(self._store, name, layout.format, types) as (writer, digest):
            for sample, inputs, encoded in iter(shard.take, None):
                tokens = shard.prepared.embeddings.tokens(sample.prompt)
                row = self._row(sample, encoded, tokens, inputs)
                if encoded.fault is None:
                    record = record_of(row, types)
                    writer.add(row["key"], self._encoding.extension, encoded.content, record)
                rows[sample.index] = row
                self._progress.sample(encoded.fault is not None)
            # Of a shard that is made again: without it, what lies there is not finished.
            self._store.delete(sidecar)
        for sample in shard.prepared.plan.samples:
            if sample.fault is not None:
                rows[sample.index] = self._row(sample, Encoded(None, None, sample.fault))
                self._progress.sample(True)
        values = [rows[index] for index in sorted(rows)]
        run, made_on = self._manifest.fingerprint, self._made_on
        note = Sidecar(values, number, run, digest.size, digest.sha256, made_on)
        write_sidecar(self._store, sidecar, note)
        failed = sum(row["status"] == FAILED for row in values)
        self._progress.shard(name, len(values) - failed, failed, time.monotonic() - start)

    def _row(
        self,
        sample: Sample,
        encoded: Encoded,
        tokens: int | None = None,
        inputs: Inputs | None = None,
    ) -> dict[str, Any]:
        """The sidecar's row of a sample."""
        bad = sample.fault is not None
        sampler = self._manifest.settings.sampler
        values = {
            "prompt": sample.prompt,
            "negative_prompt": sample.negative_prompt,
            "seed": sample.seed,
            "steps": sampler.num_inference_steps,
            "guidance_scale": sample.guidance_scale,
            "sampler": sampler.name,
            "width": sample.width,
            "height": sample.height,
            "image": sample.image,
            "mask": sample.mask,
            "strength": sample.strength,
            **dict.fromkeys(("image_sha256", "mask_sha256")),
            **({} if inputs is None else inputs.sha256),
        }
        return {
            "index": sample.index,
            "id": sample.id,
            "key": key_of(sample.id),
            "line": sample.line,
            **(dict.fromkeys(values) if bad else values),
            "tokens": tokens,
            "sha256": encoded.sha256,
            "bytes": None if encoded.content is None else len(encoded.content),
            "status": OK if encoded.fault is None else FAILED,
            "reason": encoded.fault,
        }
