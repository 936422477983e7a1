# SPDX-License-Identifier: Apache-2.0
"""What every reader of files needs: local or not, JSON that may be damaged, git-lfs pointers."""

import json
import os
from pathlib import Path
from typing import Any


LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LFS_ADVICE = "is a git-lfs pointer instead of the file: fetch the file with `git lfs pull`"


class CheckpointError(ValueError):
    """A checkpoint, or a destination for one, that cannot be used; one sentence for people."""


def is_local(path: os.PathLike) -> bool:
    """Whether a path is on this machine: no URL such as gs://bucket/folder."""
    return "://" not in str(path)


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
    if content.startswith(LFS_POINTER):
        raise ValueError(f"{path} {LFS_ADVICE}")
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
