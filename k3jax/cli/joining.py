# SPDX-License-Identifier: Apache-2.0
"""Processes of several hosts as one program with one mesh, by jax.distributed."""

import argparse
import contextlib
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator


TIMEOUT = 120.0  # seconds until all processes must have joined
NOTE_AFTER = 10.0  # seconds of waiting after which a note says so
JAX_LONGER = (
    60  # seconds by which JAX would wait longer; it ends the process with a C++ stack trace
)
NOT_JOINED = 1  # exit code; not that of bad input (2), which launch/gke does not try again


def add_distributed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--distributed",
        metavar="auto|HOST:PORT,N,I",
        help="join the processes of all hosts to one mesh: found by JAX (TPU pods, GKE, SLURM, "
        "Open MPI), or the address of process 0, how many there are, and which this is (from 0)",
    )
    parser.add_argument(
        "--distributed-timeout",
        type=float,
        default=TIMEOUT,
        metavar="S",
        help=f"seconds until all of them must have joined ({TIMEOUT:g})",
    )


def join(distributed: str | None, timeout: float = TIMEOUT) -> None:
    """Joins the other processes; before anything else of JAX. None: this process is alone.

    Ends the process with a sentence where not all of them have joined after `timeout` seconds.

    Raises:
        ValueError: the text is neither, or nothing tells of other processes; no such time.
    """
    from k3jax.arguments import check_number

    check_number(timeout, "--distributed-timeout", least=1)
    if distributed is None:
        return
    explicit = re.fullmatch(r"([^,\s]+:(\d+)),(\d+),(\d+)", distributed)
    port, count, number = (0, 0, 0) if explicit is None else map(int, explicit.groups()[1:])
    if distributed != "auto" and not (number < count and port < 2**16):
        raise ValueError(
            f"--distributed is {distributed!r}; it must be auto, or HOST:PORT,N,I with the address "
            "of process 0, the number of processes, and the number of this one, from 0 to N - 1."
        )

    import jax

    patience = {"initialization_timeout": int(timeout) + JAX_LONGER}
    if explicit is not None:
        address = explicit[1]
        with _gives_up(timeout, lambda: _missing(address, count)):
            jax.distributed.initialize(address, count, number, **patience)
        return
    try:
        with _gives_up(timeout, lambda: "not all processes of this job have joined"):
            jax.distributed.initialize(**patience)
    except ValueError as error:
        raise ValueError(
            "--distributed auto finds nothing here that tells of other processes (a TPU pod, GKE, "
            "SLURM, Open MPI): give --distributed HOST:PORT,N,I."
        ) from error


@contextlib.contextmanager
def _gives_up(timeout: float, missing: Callable[[], str]) -> Iterator[None]:
    """Ends the process when what runs inside has taken longer than `timeout` seconds.

    From a thread: JAX waits in C++, where no exception reaches it.

    Args:
        missing: says what is still waited for.
    """
    joined = threading.Event()

    def watch():
        first = min(NOTE_AFTER, timeout)
        if joined.wait(first):
            return
        if first < timeout:
            note = f"{missing()}; waiting {timeout - first:g} seconds more"
            print(f"k3jax: note: {note}.", file=sys.stderr, flush=True)
        if joined.wait(timeout - first):
            return
        error = (
            f"{missing()}, after {timeout:g} seconds: start all of them with the same address and "
            "number of processes, or wait longer with --distributed-timeout SECONDS"
        )
        print(f"k3jax: error: {error}.", file=sys.stderr, flush=True)
        os._exit(NOT_JOINED)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        joined.set()


def _missing(address: str, count: int) -> str:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
            return f"not all of the {count} processes have joined at {address}"
    except (OSError, OverflowError):
        return f"process 0 does not answer at {address}"


def writes() -> bool:
    """Whether this is the process that writes what all of them have made."""
    import jax

    return jax.process_index() == 0
