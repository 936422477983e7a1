# SPDX-License-Identifier: Apache-2.0
"""Where a checkpoint is: in a local folder, or on the Hugging Face hub to be fetched from there."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from huggingface_hub import list_repo_files, snapshot_download

from k3jax.convert.layouts import Layout
from k3jax.convert.rules import ConversionError


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def fetch(
    source: str | Path, find: Callable[[Iterable[str], str], Layout]
) -> tuple[Path, Layout, dict[str, str]]:
    """The local root of a checkpoint and its layout, after a download where one is needed.

    Args:
        source: a folder that exists, or else an `owner/name` on the Hugging Face hub.
        find: names of all files, and a name for error messages, to a layout.

    Returns:
        Root, layout, and where it comes from: {"path": ...} or {"repo": ...}.

    Raises:
        ConversionError: `source` is neither, or the hub cannot be reached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder, find(_files(folder), str(folder)), {"path": str(folder.resolve())}
    if folder.exists():
        raise ConversionError(f"{source} is a file; give the folder that holds the checkpoint.")
    if not HUB_ID.fullmatch(str(source)):
        raise ConversionError(f"{source} is neither a folder nor a Hugging Face id (owner/name).")
    repo = str(source)
    names = _hub_files(repo)
    if names is None:  # offline: an earlier download may be complete
        root = _download(repo, local_files_only=True)
        layout = find(_files(root), repo)
    else:
        layout = find(names, repo)
        root = _download(repo, allow_patterns=layout.files())
    return root, layout, {"repo": repo}


def _hub_files(repo):
    """Names of the files of a repository; None without a network."""
    try:
        return list_repo_files(repo)
    except Exception as error:  # the hub's client raises those of its HTTP library as well
        if getattr(error, "response", None) is None and not isinstance(error, ValueError):
            return None
        raise ConversionError(
            f"{repo} is no folder here, and the Hugging Face hub does not give it: {_line(error)}"
        ) from None


def _download(repo, **kwargs) -> Path:
    try:
        return Path(snapshot_download(repo, **kwargs))
    except Exception as error:
        raise ConversionError(
            f"{repo} is no folder here, and cannot be fetched from the Hugging Face hub: "
            f"{_line(error)}"
        ) from None


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _files(root: Path) -> list[str]:
    # Four levels are enough for every layout; a home directory is not walked in vain.
    found = (path for depth in ("*", "*/*", "*/*/*", "*/*/*/*") for path in root.glob(depth))
    return [path.relative_to(root).as_posix() for path in found if path.is_file()]
