# SPDX-License-Identifier: Apache-2.0
"""Finds a checkpoint in a local folder, or downloads it from the Hugging Face hub."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from k3jax.convert.layouts import Layout
from k3jax.convert.rules import ConversionError
from k3jax.convert.weight_files import ReadBytes


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
TIMEOUT = 10
"""Seconds to wait for the hub's answer; there is one try."""

Find = Callable[[Iterable[str], str, ReadBytes], Layout]
"""Names of all files, a name for error messages, and a reader of small files, to a layout."""


def fetch(source: str | Path, find: Find) -> tuple[Path, Layout, dict[str, str]]:
    """The local root of a checkpoint and its layout, after a download where one is needed.

    Args:
        source: a folder that exists, or else an `owner/name` on the Hugging Face hub.
        find: picks the files.

    Returns:
        Root, layout, and where it comes from: {"path": ...} or {"repo": ...}.

    Raises:
        ConversionError: `source` is neither, or the hub cannot be reached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        layout = find(_files(folder), str(folder), _reader(folder))
        return folder, layout, {"path": str(folder.resolve())}
    if folder.exists():
        raise ConversionError(f"{source} is a file; give the folder that holds the checkpoint.")
    if not HUB_ID.fullmatch(str(source)):
        raise ConversionError(f"{source} is neither a folder nor a Hugging Face id (owner/name).")
    repo = str(source)
    try:
        names = _hub_files(repo)
    except _Unreachable as error:  # an earlier download may be complete
        root = _downloaded(repo, error)
        return root, find(_files(root), repo, _reader(root)), {"repo": repo}

    def read_bytes(name: str) -> bytes:
        return (_download(repo, [name]) / name).read_bytes()

    layout = find(names, repo, read_bytes)
    return _download(repo, layout.files()), layout, {"repo": repo}


class _Unreachable(Exception):
    """The hub did not answer; the message is the reason."""


def _hub_files(repo: str) -> list[str]:
    """Names of the files of a repository, in one try: the client's own listing retries for 23 s.

    Raises:
        _Unreachable: no network, or no answer within TIMEOUT.
    """
    try:
        return [file.rfilename for file in HfApi().model_info(repo, timeout=TIMEOUT).siblings]
    except Exception as error:  # the hub's client raises those of its HTTP library as well
        response = getattr(error, "response", None)
        if response is None and not isinstance(error, ValueError):
            raise _Unreachable(_line(error).rstrip(".")) from None
        raise ConversionError(
            f"{repo} is no folder here, and the Hugging Face hub does not give it: {_line(error)}"
        ) from None


def _downloaded(repo: str, error: _Unreachable) -> Path:
    """Where an earlier download of a repository is."""
    try:
        return Path(snapshot_download(repo, local_files_only=True))
    except Exception:
        raise ConversionError(
            f"{repo} is no folder here, was not downloaded before, and the Hugging Face hub "
            f"cannot be reached ({error}): on a machine with a network run `hf download {repo} "
            "--local-dir FOLDER`, copy FOLDER here, and give it as the source."
        ) from None


def _download(repo: str, names: list[str]) -> Path:
    try:
        return Path(snapshot_download(repo, allow_patterns=names))
    except Exception as error:
        raise ConversionError(
            f"{repo} is no folder here, and cannot be fetched from the Hugging Face hub "
            f"({_line(error).rstrip('.')}): run the command again, or run `hf download {repo} "
            "--local-dir FOLDER` and give FOLDER as the source."
        ) from None


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _reader(root: Path) -> ReadBytes:
    return lambda name: (root / name).read_bytes()


def _files(root: Path) -> list[str]:
    # Four levels are enough for every layout; a home directory is not walked in vain.
    found = (path for depth in ("*", "*/*", "*/*/*", "*/*/*/*") for path in root.glob(depth))
    return [path.relative_to(root).as_posix() for path in found if path.is_file()]
