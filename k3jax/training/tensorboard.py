# SPDX-License-Identifier: Apache-2.0
"""TensorBoard files of a run, written by the calling thread, which gets the errors.

(`tensorboardX.SummaryWriter` writes in a thread of its own and reports errors at process exit.)
"""

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from k3jax.training.run_files import name_in_errors


FLUSH_SECONDS = 30


class TensorBoard:
    """An event file in a folder.

    Every method raises OSError with the folder's name if the file cannot be written.
    """

    def __init__(self, folder: Path, first_step: int):
        """
        Args:
            first_step: TensorBoard hides values of earlier files from this step on; 0: none.
        """
        self.folder, self._flushed_at = folder, time.monotonic()
        with name_in_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"))
            if first_step:
                log = SessionLog(status=SessionLog.START)
                self._write(Event(step=first_step, session_log=log))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        with name_in_errors(self.folder):
            for name, value in values.items():
                self._write(Event(step=step, summary=summary.scalar(name, value)))

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Adds a picture, uint8 (h, w, 3)."""
        picture = summary.image(name, pixels, dataformats="HWC")
        with name_in_errors(self.folder):
            self._write(Event(step=step, summary=picture))

    def close(self) -> None:
        with name_in_errors(self.folder):
            self._writer.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)
        if time.monotonic() - self._flushed_at >= FLUSH_SECONDS:
            self._writer.flush()
            self._flushed_at = time.monotonic()
