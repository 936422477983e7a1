# SPDX-License-Identifier: Apache-2.0
"""Atomic writes, errors that name the file, and locks between processes."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jax

from k3jax.locks import LockFile
from k3jax.training.signals import agree


def write_whole(path: Path, content: Callable[[BinaryIO], Any]) -> None:
    """Writes a file atomically: it appears, or is replaced, once all of `content(file)` is on disk.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with name_in_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as file:
                content(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):  # frees the space on a full disk
            part.unlink()


@contextlib.contextmanager
def name_in_errors(path: str | os.PathLike) -> Iterator[None]:
    """Adds `path` to errors of the system without a file name, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def exclusive_lock(lock: Path, busy: str) -> Iterator[None]:
    """Holds a lock during the `with`; process 0 holds it for its whole job.

    Args:
        lock: an empty file, created if necessary.
        busy: message of the error.

    Raises:
        ValueError: another run holds the lock; on every process of this job.
    """
    held = None
    if jax.process_index() == 0:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = LockFile(lock)
    try:
        if agree(held is not None and not held.take()):
            raise ValueError(busy)
        yield
    finally:
        if held is not None:
            held.close()
