# SPDX-License-Identifier: Apache-2.0
"""Files on this machine or at an address that fsspec knows (gs://, s3://, ...), to be read."""

import contextlib
import glob
import os
from collections.abc import Iterator
from typing import BinaryIO


PART = ".part"


class StorageError(ValueError):
    """The data set cannot be written or read; one sentence for people."""


def is_remote(path: str) -> bool:
    return "://" in path


def open_binary(path: str) -> BinaryIO:
    """A file to read from and seek in, local or not.

    Raises:
        ValueError: it does not exist, or cannot be opened.
    """
    try:
        if is_remote(path):
            with driver_named(path):
                return fsspec_module().open(path, "rb").open()
        return open(os.path.expanduser(path), "rb")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from None


def expanded(pattern: str) -> list[str]:
    """The files that a pattern means, sorted; the pattern itself if it has no wildcard."""
    if not any(character in pattern for character in "*?["):
        return [pattern]
    if is_remote(pattern):
        with driver_named(pattern):
            files, _, _ = fsspec_module().core.get_fs_token_paths(pattern)
        protocol = pattern.partition("://")[0]
        return sorted(f"{protocol}://{path.lstrip('/')}" for path in files.glob(pattern))
    return sorted(glob.glob(os.path.expanduser(pattern), recursive=True))


@contextlib.contextmanager
def explained(path) -> Iterator[None]:
    """What the system says of a write as a sentence with the place."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error.strerror or error}. What is finished stays: mend "
            "this and run the same command again."
        ) from error


@contextlib.contextmanager
def driver_named(path: str) -> Iterator[None]:
    """What fsspec says where it has no package for an address, as an error about that package."""
    try:
        yield
    except ModuleNotFoundError:
        raise
    except ImportError as error:
        if path.startswith(("gs://", "gcs://")):
            raise ModuleNotFoundError(str(error), name="gcsfs") from None
        raise ImportError(f"{path} cannot be opened: {error}") from None


def fsspec_module():
    import fsspec

    return fsspec
