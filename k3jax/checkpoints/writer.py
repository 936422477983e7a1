# SPDX-License-Identifier: Apache-2.0
"""Writing a checkpoint larger than memory, so that it appears whole or not at all."""

import contextlib
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath

from k3jax.checkpoints import orbax_io
from k3jax.checkpoints.cards import model_card
from k3jax.checkpoints.digests import array_digest, combined_digest
from k3jax.checkpoints.format import (
    CONFIG,
    TOKENIZER,
    as_path,
    config_bytes,
    looks_like_checkpoint,
    read_checkpoint,
)
from k3jax.checkpoints.manifest import CARD, file_digest, files_below, read_manifest, write_manifest
from k3jax.checkpoints.new_folder import disk_errors, new_folder
from k3jax.config import COMPONENTS, ModelConfig
from k3jax.files import CheckpointError, is_local


# Each save leaves a folder of its own in the checkpoint: small arrays are gathered to this size.
GROUP_BYTES = 256 << 20
_MARK = ".incomplete"  # a file in a bucket


class CheckpointWriter:
    """Writes a checkpoint: ``with CheckpointWriter(path) as writer: ...; writer.commit(...)``.

    A local checkpoint is written in a folder beside `path` (see `new_folder`) and renamed by
    `commit`. In a bucket, where nothing can be renamed, config.json is written last.

    Writing runs in the background, one group of arrays after the caller, and finished files are
    hashed while they are still in the page cache. Memory: the arrays of the group being
    gathered and of the group being written, each at most GROUP_BYTES + one array.

    Args:
        path: a folder that does not exist, or is empty.
        overwrite: replace an existing checkpoint (never another folder) at commit.
        compressed: by zstd, which saves up to a fifth of bfloat16 and takes 2.5 times as long.

    Raises:
        CheckpointError: the destination exists, or another run is writing it.
    """

    def __init__(self, path, overwrite: bool = False, compressed: bool = False):
        self.path = as_path(path)
        self.folder = self.path
        """Where the checkpoint is being written; `path` from `commit` on."""
        self._overwrite, self._compressed = overwrite, compressed
        self._components: dict[str, str | None] = {}
        self._digests: dict[str, dict[str, str]] = {}
        self._shared = {}
        self._group: dict[str, np.ndarray] = {}
        self._group_component = ""
        self._group_size = 0
        self._writing: Future | None = None
        self._hashes: dict[tuple, Future] = {}  # by inode: Orbax renames the files at the end
        self._seen: set[str] = set()
        self._committed = False

    def __enter__(self) -> "CheckpointWriter":
        self._check_destination()
        self._files = contextlib.ExitStack()
        if is_local(self.path):
            self.folder = self._files.enter_context(new_folder(self.path, self._overwrite))
        else:
            with disk_errors(self.path, "created"):
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / _MARK).touch()
        self._writer = ThreadPoolExecutor(1)  # one: Orbax saves do not overlap
        self._hasher = ThreadPoolExecutor(1)
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._writer.shutdown(cancel_futures=True)
        self._hasher.shutdown(cancel_futures=True)
        if self._committed:
            return
        if not is_local(self.path):
            self.folder.rmtree(missing_ok=True)
        if kind is None:
            error = RuntimeError(f"the writer of {self.path} was closed without commit().")
            with self._files:
                raise error
        self._files.__exit__(kind, error, trace)

    def write(
        self,
        component: str,
        arrays: Mapping[str, np.ndarray],
        digests: Mapping[str, str] | None = None,
    ) -> None:
        """Adds arrays to a component, any number of times.

        Args:
            arrays: dotted on-disk name -> array. They are not copied and must not be changed
                afterwards.
            digests: `array_digest` of each, where the caller has it already.
        """
        if component not in COMPONENTS or component in self._shared:
            raise CheckpointError(f"{self.path}: {component!r} cannot be written here.")
        self._components[component] = None
        names = self._digests.setdefault(component, {})
        for name, array in arrays.items():
            if name in names:
                raise CheckpointError(f"{component}: {name} occurs twice.")
            names[name] = (digests or {}).get(name, "")  # "": computed in the background
            if component != self._group_component:
                self._flush()
                self._group_component = component
            self._group[name] = array
            self._group_size += array.nbytes
            if self._group_size >= GROUP_BYTES:
                self._flush()

    def share(self, component: str, other) -> None:
        """Refers to another checkpoint's component instead of holding it."""
        if component not in COMPONENTS or component in self._components:
            raise CheckpointError(f"{self.path}: {component!r} cannot be shared here.")
        other = read_checkpoint(other)
        folder = other.component_path(component)
        path = str(folder)
        if is_local(self.path) and is_local(folder):
            if os.stat(self.path.parent).st_dev == os.stat(folder).st_dev:
                path = os.path.relpath(folder, self.path)
        self._components[component] = path
        self._shared[component] = (other, read_manifest(folder.parent)["components"][component])

    def add_tokenizer(self, folder) -> None:
        """Copies the files of a tokenizer folder."""
        folder = as_path(folder)
        if not folder.is_dir() or not any(folder.iterdir()):
            raise CheckpointError(f"{folder} is not a folder with a tokenizer.")
        with disk_errors(self.path):
            for file in files_below(folder):
                target = self.folder / TOKENIZER / file.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.copy(target)

    def commit(self, config: ModelConfig, source: Mapping[str, Any], dtype: str) -> None:
        """Finishes the checkpoint and puts it in its place.

        Args:
            source: where the weights come from; anything that JSON can hold.
            dtype: the dtype in which they are used by default.
        """
        for component, (other, _) in self._shared.items():
            if getattr(config, component) != getattr(other.config, component):
                raise CheckpointError(
                    f"The {component} of {other.path} has another architecture: "
                    f"{getattr(other.config, component)} instead of {getattr(config, component)}."
                )
        if not self._components:
            raise CheckpointError(f"{self.path}: no component was written.")
        self._flush()
        self._wait()
        for component in self._digests:
            orbax_io.finish(self.folder / component)
        digests = {c: combined_digest(leaves) for c, leaves in self._digests.items()}
        digests |= {c: digest for c, (_, digest) in self._shared.items()}
        content = config_bytes(config, source, dtype, self._components)
        card = model_card(config, source, dtype, combined_digest(digests))
        with disk_errors(self.path):
            (self.folder / _MARK).unlink(missing_ok=True)
            write_manifest(self.folder, digests, self._digest_of, extra={CONFIG: content})
            (self.folder / CARD).write_text(card, encoding="utf-8")
            (self.folder / CONFIG).write_bytes(content)
        self._files.close()
        self.folder = self.path
        self._committed = True

    def _flush(self) -> None:
        group, self._group, self._group_size = self._group, {}, 0
        self._wait()
        if group:
            self._writing = self._writer.submit(self._save, self._group_component, group)

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _save(self, component: str, group: dict[str, np.ndarray]) -> None:
        group = {name: np.ascontiguousarray(array) for name, array in group.items()}
        with orbax_io.saving(self.folder / component, group, self._compressed):
            digests = self._digests[component]
            digests |= {n: array_digest(a) for n, a in group.items() if not digests[n]}
        if is_local(self.folder):
            self._hash_new_files()

    def _hash_new_files(self) -> None:
        for folder, _, names in os.walk(self.folder):
            for path in (os.path.join(folder, name) for name in names):
                if path not in self._seen:
                    self._seen.add(path)
                    digest = self._hasher.submit(_digest_if_there, epath.Path(path))
                    self._hashes[_identity(path)] = digest

    def _digest_of(self, path: epath.Path) -> str:
        known = self._hashes.get(_identity(path)) if is_local(path) else None
        return known.result() or file_digest(path) if known else file_digest(path)

    def _check_destination(self) -> None:
        if not self.path.exists():
            return
        if looks_like_checkpoint(self.path):
            if not self._overwrite:
                raise CheckpointError(
                    f"{self.path} exists already: choose another destination, "
                    "or ask to overwrite it."
                )
        elif not is_local(self.path) and (self.path / _MARK).exists():
            self.path.rmtree()  # what an interrupted run left in a bucket
        elif not self.path.is_dir() or any(self.path.iterdir()):
            raise CheckpointError(
                f"{self.path} exists and is not a checkpoint: choose another destination."
            )


def _identity(path: os.PathLike | str) -> tuple[int, int, int]:
    stat = os.stat(path)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _digest_if_there(path: epath.Path) -> str | None:
    try:
        return file_digest(path)
    except FileNotFoundError:  # renamed meanwhile; it is hashed at the end
        return None
