# SPDX-License-Identifier: Apache-2.0
"""One program over the processes of several hosts, with jax.distributed."""

import argparse
import contextlib
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator


TIMEOUT = 120.0  # seconds in which all processes must connect
NOTE_AFTER = 10.0  # seconds of waiting before a note is printed
MARGIN = 60  # JAX waits longer by this: at its own timeout it aborts with a C++ stack trace
NOT_CONNECTED = 1  # exit code; launch/gke does not retry that of bad input (2)


def add_distributed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--distributed",
        metavar="auto|HOST:PORT,N,I",
        help="run with the processes of all hosts on one mesh: auto if JAX finds them (TPU pods, "
        "GKE, SLURM, Open MPI); or the address of process 0, the number of processes, and the "
        "number of this process from 0",
    )
    parser.add_argument(
        "--distributed-timeout",
        type=float,
        default=TIMEOUT,
        metavar="S",
        help=f"seconds in which all of them must connect ({TIMEOUT:g})",
    )


def connect(distributed: str | None, timeout: float = TIMEOUT) -> None:
    """Connects to the other processes; call it before any other function of JAX.

    If not all of them have connected after `timeout` seconds, the process exits with a message.

    Args:
        distributed: "auto" or HOST:PORT,N,I; None: there are no other processes.

    Raises:
        ValueError: another text or timeout, or "auto" where JAX finds no other processes.
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

    wait = {"initialization_timeout": int(timeout) + MARGIN}
    if explicit is not None:
        address = explicit[1]
        with _exits_after(timeout, lambda: _missing(address, count)):
            jax.distributed.initialize(address, count, number, **wait)
        return
    try:
        with _exits_after(timeout, lambda: "not all processes of this job have joined"):
            jax.distributed.initialize(**wait)
    except ValueError as error:
        raise ValueError(
            "--distributed auto finds no other processes (TPU pod, GKE, SLURM, Open MPI): give "
            "--distributed HOST:PORT,N,I."
        ) from error


@contextlib.contextmanager
def _exits_after(timeout: float, missing: Callable[[], str]) -> Iterator[None]:
    """Exits the process if the body of the `with` takes longer than `timeout` seconds.

    From a thread, because JAX waits in C++, which no exception reaches.

    Args:
        missing: returns what is missing, in words.
    """
    connected = threading.Event()

    def watch():
        first = min(NOTE_AFTER, timeout)
        if connected.wait(first):
            return
        if first < timeout:
            note = f"{missing()}; waiting {timeout - first:g} seconds more"
            print(f"k3jax: note: {note}.", file=sys.stderr, flush=True)
        if connected.wait(timeout - first):
            return
        error = (
            f"{missing()}, after {timeout:g} seconds: start all of them with the same address and "
            "number of processes, or wait longer with --distributed-timeout SECONDS"
        )
        print(f"k3jax: error: {error}.", file=sys.stderr, flush=True)
        os._exit(NOT_CONNECTED)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        connected.set()


def _missing(address: str, count: int) -> str:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
            return f"not all of the {count} processes have joined at {address}"
    except (OSError, OverflowError):
        return f"process 0 does not answer at {address}"


def is_writer() -> bool:
    """Whether this is the process that writes the results."""
    import jax

    return jax.process_index() == 0
