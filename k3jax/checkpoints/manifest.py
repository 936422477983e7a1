# SPDX-License-Identifier: Apache-2.0
"""Digests of a checkpoint: what makes flipped, truncated and lost bytes noticeable.

Orbax reads a file with flipped bytes without complaint, so manifest.json keeps the size and CRC-32
of every file. It finds accidents at three times the speed of a cryptographic hash, which a 17 GB
encoder feels at every first load. There is also one digest per component, of the arrays instead of
the files (whose names are random): see k3jax/checkpoints/digests.py.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath
from tqdm import tqdm

from k3jax.files import CheckpointError, is_local, read_object, user_cache


MANIFEST = "manifest.json"
CARD = "README.md"
"""At the top of a checkpoint, for people: they go on writing it, so no digest is kept of it."""
MANIFEST_VERSION = 1


def file_digest(path: epath.Path) -> str:
    """CRC-32 of a file, as 8 hexadecimal digits."""
    crc = 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            crc = zlib.crc32(part, crc)
    return f"{crc:08x}"


def files_below(folder: epath.Path) -> Iterator[epath.Path]:
    """All files of a folder and its subfolders, sorted."""
    for child in sorted(folder.iterdir()):
        if child.is_dir():
            yield from files_below(child)
        else:
            yield child


def write_manifest(
    folder: epath.Path,
    components: Mapping[str, str],
    digest: Callable[[epath.Path], str],
    extra: Mapping[str, bytes],
) -> None:
    """Writes manifest.json for all files of `folder` but its card.

    Args:
        components: component -> digest of its arrays; also of those shared with other checkpoints.
        digest: `file_digest`, or what knows its result already.
        extra: name -> content of files at the top that will be written after the manifest.
    """
    paths = [path for path in files_below(folder) if path != folder / CARD]
    # The last files are still in the page cache: two threads are enough for any disk.
    with ThreadPoolExecutor(2) as pool:
        digests = pool.map(digest, paths)
    files = {
        str(path.relative_to(folder)): {"size": file_size(path), "crc32": crc}
        for path, crc in zip(paths, digests, strict=True)
    }
    for name, content in extra.items():
        files[name] = {"size": len(content), "crc32": f"{zlib.crc32(content):08x}"}
    manifest = {"version": MANIFEST_VERSION, "components": dict(components), "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def read_manifest(folder: epath.Path) -> dict:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: it is missing, or not one that this version understands.
    """
    path = folder / MANIFEST
    try:
        manifest = read_object(path)
        if manifest.get("version") != MANIFEST_VERSION:
            raise CheckpointError(
                f"{path} is of version {manifest.get('version')!r}, but this k3jax reads version "
                f"{MANIFEST_VERSION}: upgrade k3jax."
            )
        _check_manifest(manifest, path)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: the checkpoint was not copied completely; copy it again."
        ) from None
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{error}; copy the checkpoint again.") from None
    return {"components": manifest["components"], "files": manifest["files"]}


def _check_manifest(manifest: Mapping, path: epath.Path) -> None:
    """Raises ValueError, a sentence without its full stop, where a manifest is not one."""
    for part in ("components", "files"):
        if not isinstance(manifest.get(part), dict):
            raise ValueError(f"{path} is damaged: it has no object {part!r}")
    for name, digest in manifest["components"].items():
        if not isinstance(digest, str):
            raise ValueError(f"{path} is damaged: the digest of {name} is {digest!r}")
    for name, entry in manifest["files"].items():
        size, crc = (entry.get(k) if isinstance(entry, dict) else None for k in ("size", "crc32"))
        if not isinstance(size, int) or not 0 <= size < 2**63 or not isinstance(crc, str):
            raise ValueError(f"{path} is damaged: its entry of {name!r} is {entry!r}")
        if "\0" in name:
            raise ValueError(f"{path} is damaged: {name!r} is no name of a file")


def file_size(path: epath.Path) -> int:
    """Bytes of a file.

    `epath.Path.stat` raises KeyError for local files whose owner is not in /etc/passwd, as in
    containers that run with another uid.
    """
    return os.stat(path).st_size if is_local(path) else path.stat().length


def file_fault(folder: epath.Path, name: str, entry: Mapping, hashed: bool = True) -> str | None:
    """What is wrong with a file, or None.

    Args:
        entry: its line in the manifest.
        hashed: False compares only the size.
    """
    path = folder / name
    try:
        size = file_size(path)
        if size != entry["size"]:
            return f"{path} has {size} bytes instead of {entry['size']}"
        if hashed and file_digest(path) != entry["crc32"]:
            return f"{path} has other bytes than when it was written (its checksum differs)"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror or error})"
    return None


def file_faults(
    folder: epath.Path, entries: Mapping[str, Mapping], progress: bool = False
) -> list[str]:
    """Hashes files; one sentence for each that differs from its manifest entry."""
    faults = []
    workers = min(8, max(2, os.cpu_count() or 2))  # zlib releases the GIL
    total = sum(entry["size"] for entry in entries.values())
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=not progress)
    with ThreadPoolExecutor(workers) as pool, bar:
        names = list(entries)
        for name, fault in zip(
            names,
            pool.map(lambda name: file_fault(folder, name, entries[name]), names),
            strict=True,
        ):
            bar.update(entries[name]["size"])
            if fault:
                faults.append(fault)
    return faults


def check_component(
    folder: epath.Path, component: str, hashed: bool, share: tuple[int, int] = (0, 1)
) -> None:
    """Checks the files of one component before they are read.

    Sizes are compared always (local folders). With `hashed`, each file is hashed too, but once per
    user and machine: what was found good is remembered with its size and modification time, so
    the 17 GB encoder costs seconds at the first load and nothing afterwards.

    Args:
        folder: the checkpoint that holds the files.
        share: (i, n): hash only every n-th file, from the i-th.

    Raises:
        CheckpointError: naming every file that is missing or differs.
    """
    entries = component_files(read_manifest(folder), component)
    if is_local(folder):
        faults = [file_fault(folder, n, entry, hashed=False) for n, entry in entries.items()]
        raise_faults(component, filter(None, faults))
    if not hashed:
        return
    names = list(entries)[share[0] :: share[1]]
    good = _VerifiedFiles(folder)
    fresh = {name: entries[name] for name in names if not good.holds(name, entries[name])}
    raise_faults(component, file_faults(folder, fresh))
    good.add(fresh)


def component_files(manifest: Mapping, component: str) -> dict[str, dict]:
    """The manifest entries of a component's files, sorted by name."""
    prefix = f"{component}/"
    return {n: e for n, e in sorted(manifest["files"].items()) if n.startswith(prefix)}


def raise_faults(component: str, faults: Iterable[str]) -> None:
    faults = list(faults)
    if faults:
        more = f"; and {len(faults) - 4} more files" if len(faults) > 4 else ""
        raise CheckpointError(
            f"The {component} is damaged: {'; '.join(faults[:4])}{more}. "
            "Copy or convert the checkpoint again."
        )


class _VerifiedFiles:
    """The files of a checkpoint that this user has hashed already, by size, time and digest."""

    def __init__(self, folder: epath.Path):
        self._folder = folder
        self._name = hashlib.sha256(str(folder).encode()).hexdigest()[:32]
        try:
            self._stamps = json.loads(self._path.read_text())
        except (OSError, ValueError):
            self._stamps = {}

    @property
    def _path(self) -> Path:
        return user_cache() / "verified" / f"{self._name}.json"

    def _stamp(self, name: str, entry: Mapping) -> list:
        stat = os.stat(self._folder / name)
        return [stat.st_size, stat.st_mtime_ns, stat.st_ino, entry["crc32"]]

    def holds(self, name: str, entry: Mapping) -> bool:
        return is_local(self._folder) and self._stamps.get(name) == self._stamp(name, entry)

    def add(self, entries: Mapping[str, Mapping]) -> None:
        if not entries or not is_local(self._folder):
            return
        self._stamps.update({name: self._stamp(name, e) for name, e in entries.items()})
        try:
            path = self._path
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(self._stamps))
            part.replace(path)
        except OSError:
            pass  # a read-only home only means hashing again next time
