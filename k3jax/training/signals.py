# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and SIGINT set a flag, which the training loop reads between two steps."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils


class Stop:
    """The flag: whether this process was asked to stop."""

    requested: str | None = None
    """Name of the first signal, such as "SIGTERM"."""


@contextlib.contextmanager
def stop_requested() -> Iterator[Stop]:
    """Catches SIGTERM and SIGINT during the `with`.

    A second SIGINT raises KeyboardInterrupt. Only the main thread can catch signals; in other
    threads the flag stays unset.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    interrupted = False

    def handle(number, frame):
        nonlocal interrupted
        name = signal.Signals(number).name
        if name == "SIGINT":
            if interrupted:
                raise KeyboardInterrupt
            interrupted = True
        again = "; once more stops at once" if name == "SIGINT" else ""
        # Not print: the signal may interrupt one.
        os.write(2, f"\n{name}: stopping after this step, with a checkpoint{again}\n".encode())
        stop.requested = stop.requested or name

    old = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            # None: a handler of C code, which Python cannot restore.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def agree(flag: bool) -> bool:
    """True on every process if `flag` is true on any, so that all stop at the same step.

    A signal reaches the processes of a job at different steps, or only some of them. Every process
    must call this at the same steps. It waits for the devices, so call it where the loop waits
    anyway, as when metrics are read.
    """
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))
