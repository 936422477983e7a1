# SPDX-License-Identifier: Apache-2.0
"""A local folder that appears whole or not at all, whatever happens to the process that writes it.

It is written as ``<path>.incomplete-<random>`` and renamed at the end. After an exception that
folder is removed; after a kill the next run for the same path removes it, if its lock is free.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator

from etils import epath

from k3jax.files import CheckpointError
from k3jax.locks import FolderLock


INCOMPLETE, REPLACED = "incomplete", "replaced"


@contextlib.contextmanager
def new_folder(path: epath.Path, overwrite: bool = False) -> Iterator[epath.Path]:
    """Yields the folder to write into; it gets the name `path` when the body ends.

    Args:
        overwrite: replace what is at `path`; otherwise that must be nothing or an empty folder.

    Raises:
        CheckpointError: another run is writing it, or the disk refuses.
    """
    with disk_errors(path, "created"):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead_runs(path)
        folder = epath.Path(f"{path}.{INCOMPLETE}-{secrets.token_hex(4)}")
        folder.mkdir()
        lock = FolderLock(folder)
    try:
        lock.take()
        yield folder
        with disk_errors(path, "created"):
            _put_in_place(folder, path, overwrite)
    except BaseException:
        folder.rmtree(missing_ok=True)
        raise
    finally:
        lock.close()


@contextlib.contextmanager
def disk_errors(path: epath.Path, verb: str = "written") -> Iterator[None]:
    """Names the destination where a disk is full or may not be written."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{path} cannot be {verb}: {reason}.") from error


def _remove_dead_runs(path: epath.Path) -> None:
    for folder in _siblings(path, INCOMPLETE):
        lock = FolderLock(folder)
        free = lock.take()
        lock.close()
        if free is False:
            raise CheckpointError(
                f"Another run is writing {path} now (in {folder}): wait for it to end."
            )
        if free:  # without locks, the run may be alive
            folder.rmtree()


def _put_in_place(folder: epath.Path, path: epath.Path, overwrite: bool) -> None:
    old = f"{path}.{REPLACED}-{secrets.token_hex(4)}"
    try:
        if overwrite and path.exists():
            os.rename(path, old)
        os.rename(folder, path)
    except OSError:
        if os.path.exists(old):
            os.rename(old, path)
        raise
    for replaced in _siblings(path, REPLACED):
        with contextlib.suppress(OSError):
            replaced.rmtree()


def _siblings(path: epath.Path, mark: str) -> list[epath.Path]:
    """What earlier runs for this path left in its parent folder."""
    start = f"{path.name}.{mark}-"  # no pattern: a name may have brackets
    return [sibling for sibling in path.parent.iterdir() if sibling.name.startswith(start)]
