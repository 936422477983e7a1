# SPDX-License-Identifier: Apache-2.0
"""The work of one process: shards pass the devices, the image encoders and the writer at once.

encode thread    encodes the texts of the next shard                    (phases.py)
device thread    computes batch after batch
image threads    read input images before their batch, encode images after it
writer thread    writes shards and sidecars                             (shard_writer.py)
main thread      handles signals, progress, and the deadline of a stop
"""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from k3jax.synthesis.batches import Batch, BatchKind
from k3jax.synthesis.image_formats import EncodedImage, encode_image
from k3jax.synthesis.input_images import InputImages, read_inputs
from k3jax.synthesis.phases import Phases
from k3jax.synthesis.progress import Progress
from k3jax.synthesis.run_manifest import RunManifest
from k3jax.synthesis.shard_writer import OpenShard, ShardWriter
from k3jax.synthesis.store import Locks, Store


MARGIN = 0.1  # share of the grace period that is kept for cleaning up
FINISH_SECONDS = 2.0  # to write the end of a shard


class StopRequest:
    """Whether a signal has asked this process to stop, and by when."""

    def __init__(self, grace: float):
        """
        Args:
            grace: seconds from the signal to the moment when the process must be gone.
        """
        self.grace = grace
        self.requested: str | None = None
        """Name of the first signal, such as "SIGTERM"."""
        self._deadline = float("inf")

    def request(self, name: str) -> None:
        if self.requested is None:
            self._deadline = time.monotonic() + self.grace * (1 - MARGIN)
            self.requested = name

    def leaves_time_for(self, seconds: float) -> bool:
        return time.monotonic() + seconds < self._deadline

    @property
    def exit_code(self) -> int:
        """That of a process ended by the signal, in a shell."""
        return 128 + getattr(signal, self.requested)


class Engine:
    """Makes shards until there are no more, or a signal asks to stop."""

    def __init__(
        self,
        store: Store,
        manifest: RunManifest,
        phases: Phases,
        stop: StopRequest,
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
        """Works to the end, and returns whether all shards were made.

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
                for encoded in self._phases:
                    if self._stop.requested or self._writer.error is not None:
                        break
                    number = encoded.batches.shard
                    if not self._locks.take_shard(number):
                        raise ValueError(
                            f"another process is making shard {number} of {self._store}: two "
                            "have the same share of the work (--job, --jobs). Stop one of them."
                        )
                    shard = self._writer.begin(encoded)
                    complete = False
                    try:
                        complete = self._fill(shard, images)
                    finally:
                        shard.end(complete)
        except BaseException as error:
            self._error = error
        finally:
            self._writer.close()

    def _fill(self, shard: OpenShard, images: ThreadPoolExecutor) -> bool:
        """Makes the images of a shard, and returns whether there was time for all."""
        left = list(shard.encoded.batches.batches)
        inputs = self._inputs(shard.encoded.batches.batches, images)
        while left and self._writer.error is None:
            if not self._stop.leaves_time_for(self._needed(left)):
                break
            batch = left.pop(0)
            sources = next(inputs)
            if sources is not None:
                batch, sources = self._usable(shard, batch, sources, images)
            if batch.samples:
                self._make_batch(shard, batch, sources, images)
        return not left

    def _make_batch(
        self,
        shard: OpenShard,
        batch: Batch,
        inputs: Sequence[InputImages] | None,
        images: ThreadPoolExecutor,
    ) -> None:
        self._progress.start()
        start = time.monotonic()
        pixels = self._phases.images(shard.encoded, batch, inputs)
        seconds = time.monotonic() - start
        self._seconds[batch.kind] = seconds
        self._progress.device(seconds)
        sources = [None] * len(batch.samples) if inputs is None else inputs
        for sample, source, image in zip(batch.samples, sources, pixels, strict=True):
            shard.put(sample, source, images.submit(encode_image, image, self._encoding))

    def _usable(
        self,
        shard: OpenShard,
        batch: Batch,
        inputs: Sequence[InputImages | str],
        images: ThreadPoolExecutor,
    ) -> tuple[Batch, list[InputImages]]:
        """The part of a batch whose input images could be read; the others are failed samples."""
        samples, good = [], []
        for sample, source in zip(batch.samples, inputs, strict=True):
            if isinstance(source, str):
                shard.put(sample, None, images.submit(EncodedImage, None, None, source))
            else:
                samples.append(sample)
                good.append(source)
        return dataclasses.replace(batch, samples=tuple(samples)), good

    def _inputs(
        self, batches: Sequence[Batch], images: ThreadPoolExecutor
    ) -> Iterator[list[InputImages | str] | None]:
        """The input images of each batch, read one batch ahead; None for texts."""

        def begin(batch: Batch):
            if batch.kind.operation == "text":
                return None
            return [images.submit(read_inputs, s, self._image_folder) for s in batch.samples]

        ahead = begin(batches[0]) if batches else None
        for following in [*batches[1:], None]:
            futures, ahead = ahead, None if following is None else begin(following)
            yield None if futures is None else [future.result() for future in futures]

    def _needed(self, batches: Iterable[Batch]) -> float:
        """Seconds to finish a shard, by the time of earlier batches of each kind."""
        if not self._stop.requested:
            return 0.0
        unknown = float("inf")  # it may have to be compiled first
        return FINISH_SECONDS + sum(self._seconds.get(b.kind, unknown) for b in batches)

    def _leave(self, code: int) -> None:
        """Ends the process at once, without waiting for the devices; removes half-written files."""
        self._store.discard_parts()
        sys.stdout.flush()
        os.write(2, b"k3jax: stopped; the shard that was being made will be made again.\n")
        os._exit(code)


@contextlib.contextmanager
def stop_on_signals(stop: StopRequest) -> Iterator[None]:
    """Catches SIGTERM and SIGINT while the body of the `with` runs in the main thread.

    A second SIGINT raises KeyboardInterrupt, which ends the process at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number, frame):
        name = signal.Signals(number).name
        if name == "SIGINT" and stop.requested:
            raise KeyboardInterrupt
        # Not print: the signal may have come in the middle of one.
        again = "; once more stops at once" if name == "SIGINT" else ""
        os.write(2, f"\nk3jax: {name}: stopping within {stop.grace:g} s{again}.\n".encode())
        stop.request(name)

    old = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
