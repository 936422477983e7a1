# SPDX-License-Identifier: Apache-2.0
"""What every reader of files needs: local or remote, files of another kind, damaged JSON."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LFS_ADVICE = "is a git-lfs pointer instead of the file: fetch the file with `git lfs pull`"
_KINDS = {
    LFS_POINTER[:16]: LFS_ADVICE,
    b"\x1f\x8b": "is compressed with gzip: unpack it with `gunzip`",
    b"PK\x03\x04": "is a zip archive, or a file of torch.save: unpack or convert it",
    b"\xff\xfe": "is text in UTF-16: save it as UTF-8",
    b"\xfe\xff": "is text in UTF-16: save it as UTF-8",
    b"<!doctype html": "is a web page instead of the file: the download failed, fetch it again",
    b"<html": "is a web page instead of the file: the download failed, fetch it again",
}
KIND_BYTES = max(map(len, _KINDS))
"""How much of a file's beginning `other_kind` needs."""


class CheckpointError(ValueError):
    """A checkpoint, or a destination for one, that cannot be used; one sentence for people."""


def is_local(path: os.PathLike) -> bool:
    """Whether a path is on this machine: no URL such as gs://bucket/folder."""
    return "://" not in str(path)


def other_kind(start: bytes, zipped: bool = False) -> str | None:
    """What a file is instead of what its name says, and what to do about it; None if unknown.

    Args:
        start: the file's first KIND_BYTES.
        zipped: the file should be a zip archive, as .npz and .pt files are.
    """
    start = start.lower() if start[:1] == b"<" else start
    for magic, text in _KINDS.items():
        if start.startswith(magic) and not (zipped and magic.startswith(b"PK")):
            return text
    return None


def shortened(names: Iterable[str], most: int = 5) -> str:
    """Names in a sentence: "a, b, c and 12 more"."""
    names = list(names)
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def user_cache() -> Path:
    """The user's folder for files that can be computed again.

    Raises:
        OSError: the user has no home directory.
    """
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError as error:
        raise OSError("this user has no home directory: set XDG_CACHE_HOME to a folder.") from error
    return cache / "k3jax"


def read_object(path: os.PathLike) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: of pathlib or etils.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: anything else; a sentence without its full stop, that starts with the path.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from None
    if kind := other_kind(content[:KIND_BYTES]):
        raise ValueError(f"{path} {kind}")
    if not content.strip():
        raise ValueError(f"{path} is damaged: it is empty")
    try:
        values = json.loads(content)
    except RecursionError:
        raise ValueError(f"{path} is damaged: its JSON is nested too deep") from None
    except ValueError as error:  # of JSON, UTF-8, or an integer of thousands of digits
        reason = str(error).partition(";")[0]
        raise ValueError(f"{path} is damaged: it is not JSON ({reason})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(values).__name__}, not an object")
    return values
