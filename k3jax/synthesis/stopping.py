# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and SIGINT as a deadline that the work looks at between two batches."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator


MARGIN = 0.1  # of the grace period, kept for cleaning up


class Stop:
    """Whether somebody asked this process to stop, and by when."""

    def __init__(self, grace: float):
        """
        Args:
            grace: seconds from the signal to the moment when the process must be gone.
        """
        self.grace = grace
        self.requested: str | None = None
        """Name of the first signal that came, such as "SIGTERM"."""
        self._deadline = float("inf")

    def request(self, name: str) -> None:
        if self.requested is None:
            self._deadline = time.monotonic() + self.grace * (1 - MARGIN)
            self.requested = name

    def leaves_time_for(self, seconds: float) -> bool:
        return time.monotonic() + seconds < self._deadline

    @property
    def exit_code(self) -> int:
        """As a shell has it for a process ended by that signal."""
        return 128 + getattr(signal, self.requested)


@contextlib.contextmanager
def stop_on_signals(stop: Stop) -> Iterator[None]:
    """Catches SIGTERM and SIGINT while the body of the `with` runs in the main thread.

    A second SIGINT raises KeyboardInterrupt, for people who do not want to wait.
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
