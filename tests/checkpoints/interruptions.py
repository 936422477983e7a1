# SPDX-License-Identifier: Apache-2.0
"""A disk that fills up, and a process that is killed, before any of its writes."""

import contextlib
import errno
import os
import shutil
import sys
import threading


class Writes:
    """Calls a function before each write of this process below a folder, while it is `watched`.

    Writes are what Python's audit hooks see: files opened for writing, folders made, files and
    folders renamed or removed. (TensorStore's own files are not seen; they are written between.)
    """

    def __init__(self):
        self._before, self._folder, self._inside = None, "", threading.local()
        sys.addaudithook(self._hook)  # for the rest of the process: hooks cannot be removed

    @contextlib.contextmanager
    def watched(self, folder, before):
        self._folder, self._before = os.fspath(folder), before
        try:
            yield
        finally:
            self._before = None

    def _hook(self, event, args):
        if self._before is None or getattr(self._inside, "here", False):
            return
        if event == "open":
            flags = args[2] or 0
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
        if not writes or not isinstance(args[0], str | os.PathLike):
            return
        if not os.fspath(args[0]).startswith(self._folder):
            return
        self._inside.here = True
        try:
            self._before(event)
        finally:
            self._inside.here = False


WRITES = Writes()
NEED_ROOM = ("open", "os.mkdir", "os.rename")
"""Events that fail on a full disk."""


@contextlib.contextmanager
def disk_full_at(folder, number: int):
    """Everything that needs room on the disk fails from the write of this number on."""
    count = 0

    def before(event):
        nonlocal count
        count += event in NEED_ROOM
        if count > number and event in NEED_ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with WRITES.watched(folder, before):
        yield


@contextlib.contextmanager
def snapshots(folder, into, chosen=None):
    """Copies the folder before each write: what a kill at that moment leaves on the disk.

    Args:
        chosen: numbers of the writes, from 0; all by default.

    Yields:
        A list that grows: the copies.
    """
    found, lock, count = [], threading.Lock(), 0

    def before(event):
        nonlocal count
        with lock:
            count += 1
            if chosen is not None and count - 1 not in chosen:
                return
            copy = into / f"{count - 1:04d}"
            with contextlib.suppress(shutil.Error):  # a file that another thread renames meanwhile
                shutil.copytree(folder, copy, copy_function=_copy)
            found.append(copy)

    with WRITES.watched(folder, before):
        yield found


def _copy(source, target):
    with contextlib.suppress(FileNotFoundError):
        shutil.copy(source, target)
