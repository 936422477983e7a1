# SPDX-License-Identifier: Apache-2.0
"""The work of one process: shards through the devices, the image encoders and the writer at once.

encode thread    reads and encodes the texts of the next shard       (phases.py)
device thread    makes batch after batch, and waits for nothing else
image threads    input images before their batch; pixels -> bytes behind it
writer thread    bytes -> shard, sidecar                             (shard_writer.py)
main thread      signals, progress, and the deadline that a signal sets
"""

import dataclasses
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from k3jax.synthesis.batches import Batch, BatchKind
from k3jax.synthesis.image_formats import Encoded, encode_image
from k3jax.synthesis.input_images import Inputs, read_inputs
from k3jax.synthesis.phases import Phases
from k3jax.synthesis.progress import Progress
from k3jax.synthesis.run_manifest import Manifest
from k3jax.synthesis.shard_writer import ShardInWork, ShardWriter
from k3jax.synthesis.stopping import Stop
from k3jax.synthesis.store import Locks, Store


FINISH_SECONDS = 2.0  # to write the end of a shard


class Engine:
    """Makes shards until there are no more, or somebody asks to stop."""

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        phases: Phases,
        stop: Stop,
        progress: Progress,
        locks: Locks,
        image_folder: str = ".",
    ):
        """
        Args:
            image_folder: where relative paths of input images start.
        """
        self._store, self._phases, self._image_folder = store, phases, image_folder
        self._stop, self._progress, self._locks = stop, progress, locks
        self._encoding = manifest.settings.encoding
        self._writer = ShardWriter(store, manifest, phases.made_on, progress, locks)
        self._error: BaseException | None = None
        self._seconds: dict[BatchKind, float] = {}

    def run(self) -> bool:
        """Works to the end; whether everything was made.

        Raises:
            The first error of any thread.
        """
        device = threading.Thread(target=self._make, daemon=True)
        writer = threading.Thread(target=self._writer.write_all, daemon=True)
        device.start()
        writer.start()
        try:
            for thread in (device, writer):
                while thread.is_alive():
                    thread.join(0.1)
                    self._progress.tick()
                    if self._stop.requested and not self._stop.leaves_time_for(0):
                        self._leave(self._stop.exit_code)
        except KeyboardInterrupt:
            self._leave(130)
        error = self._writer.error or self._error
        if error is not None:
            raise error
        return not self._stop.requested

    def _make(self) -> None:
        """The device thread."""
        try:
            with ThreadPoolExecutor(os.cpu_count(), "image") as images:
                for prepared in self._phases:
                    if self._stop.requested or self._writer.error is not None:
                        break
                    number = prepared.plan.shard
                    if not self._locks.take_shard(number):
                        raise ValueError(
                            f"shard {number} of {self._store} is being made by another process: "
                            "two have the same share of the work (--job, --jobs). Stop one of them."
                        )
                    shard = self._writer.begin(prepared)
                    complete = False
                    try:
                        complete = self._fill(shard, images)
                    finally:
                        shard.end(complete)
        except BaseException as error:
            self._error = error
        finally:
            self._writer.close()

    def _fill(self, shard: ShardInWork, images: ThreadPoolExecutor) -> bool:
        """Makes the images of a shard; whether there was time for all."""
        left = list(shard.prepared.plan.batches)
        inputs = self._inputs(shard.prepared.plan.batches, images)
        while left and self._writer.error is None:
            if not self._stop.leaves_time_for(self._needed(left)):
                break
            batch = left.pop(0)
            given = next(inputs)
            if given is not None:
                batch, given = self._usable(shard, batch, given, images)
            if batch.samples:
                self._make_batch(shard, batch, given, images)
        return not left

    def _make_batch(
        self,
        shard: ShardInWork,
        batch: Batch,
        inputs: Sequence[Inputs] | None,
        images: ThreadPoolExecutor,
    ) -> None:
        self._progress.start()
        start = time.monotonic()
        made = self._phases.make(shard.prepared, batch, inputs)
        seconds = time.monotonic() - start
        self._seconds[batch.bucket] = seconds
        self._progress.device(seconds)
        given = [None] * len(batch.samples) if inputs is None else inputs
        for sample, source, image in zip(batch.samples, given, made, strict=True):
            shard.put(sample, source, images.submit(encode_image, image, self._encoding))

    def _usable(
        self,
        shard: ShardInWork,
        batch: Batch,
        inputs: Sequence[Inputs | str],
        images: ThreadPoolExecutor,
    ) -> tuple[Batch, list[Inputs]]:
        """The part of a batch whose input images could be read; the others are failed samples."""
        samples, good = [], []
        for sample, given in zip(batch.samples, inputs, strict=True):
            if isinstance(given, str):
                shard.put(sample, None, images.submit(Encoded, None, None, given))
            else:
                samples.append(sample)
                good.append(given)
        return dataclasses.replace(batch, samples=tuple(samples)), good

    def _inputs(
        self, batches: Sequence[Batch], images: ThreadPoolExecutor
    ) -> Iterator[list[Inputs | str] | None]:
        """What the samples of each batch start from, read one batch ahead; None for texts."""

        def begin(batch: Batch):
            if batch.bucket.operation == "text":
                return None
            return [images.submit(read_inputs, s, self._image_folder) for s in batch.samples]

        ahead = begin(batches[0]) if batches else None
        for following in [*batches[1:], None]:
            futures, ahead = ahead, None if following is None else begin(following)
            yield None if futures is None else [future.result() for future in futures]

    def _needed(self, batches: Iterable[Batch]) -> float:
        """Seconds to finish a shard: what is left of it, at the speed of the last batches."""
        if not self._stop.requested:
            return 0.0
        unknown = float("inf")  # it may have to be compiled first
        return FINISH_SECONDS + sum(self._seconds.get(b.bucket, unknown) for b in batches)

    def _leave(self, code: int) -> None:
        """Ends the process now, whatever the devices are doing; nothing half-written stays."""
        self._store.discard_parts()
        sys.stdout.flush()
        os.write(2, b"k3jax: stopped; the shard that was being made will be made again.\n")
        os._exit(code)
