# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a data set: one shard, or everything, by reading all of it."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from k3jax.synthesis.image_formats import readable_fault
from k3jax.synthesis.metadata import OK, Sidecar, finished_shards, read_sidecar, sidecar_fault
from k3jax.synthesis.run_manifest import DATA, METADATA, RunManifest, ShardLayout
from k3jax.synthesis.shard_formats import StoredImage, read_shard, shard_digest
from k3jax.synthesis.store import PART, Store


Check = Literal["sha256", "size", "none"]
SHOWN_IDS = 5


@dataclass(frozen=True)
class ShardAudit:
    """The result of reading one shard.

    Attributes:
        faults: sentences; none where all is well.
        ids: hashes of the ids of its images.
        failed: reason -> number of failed samples.
        made_on: see `Sidecar`.
    """

    shard: int
    faults: tuple[str, ...]
    images: int = 0
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    failed: Mapping[str, int] = field(default_factory=dict)
    made_on: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Audit:
    """The result of reading a whole data set.

    Attributes:
        missing: shards that are not finished.
        damaged: shard -> what is wrong with it.
        duplicates: ids that occur more than once, with the shards that hold them.
        made_on: pairs of devices (see `Sidecar`) and the shards made on them.
        unknown: files that are not part of the data set.
    """

    shards: int
    samples: int
    images: int
    failed: Mapping[str, int]
    missing: Sequence[int]
    damaged: Mapping[int, Sequence[str]]
    duplicates: Mapping[str, Sequence[int]]
    made_on: Sequence[tuple[Mapping[str, Any], Sequence[int]]]
    unknown: Sequence[str]

    @property
    def is_good(self) -> bool:
        return not (self.missing or self.damaged or self.duplicates or self.unknown)

    @property
    def to_remake(self) -> list[int]:
        """The shards to make again."""
        doubled = (shard for shards in self.duplicates.values() for shard in shards)
        return sorted({*self.missing, *self.damaged, *doubled})


def audit(
    store: Store, manifest: RunManifest, decode: bool = True, progress: bool = False
) -> Audit:
    """Reads all shards.

    Args:
        decode: also decode every image, which takes most of the time.
    """
    layout = manifest.layout
    finished = finished_shards(store, layout)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(
            tqdm(
                pool.map(
                    lambda shard: audit_shard(store, manifest, shard, decode), sorted(finished)
                ),
                total=len(finished),
                desc="verify",
                unit="shard",
                disable=not progress,
            )
        )
    failed, made_on = Counter(), {}
    for result in results:
        failed.update(result.failed)
        if result.made_on:
            kind = tuple(sorted((k, str(v)) for k, v in result.made_on.items()))
            made_on.setdefault(kind, (result.made_on, []))[1].append(result.shard)
    return Audit(
        layout.shards,
        layout.samples,
        sum(result.images for result in results),
        dict(failed),
        [shard for shard in range(layout.shards) if shard not in finished],
        {result.shard: result.faults for result in results if result.faults},
        _duplicates(store, layout, results),
        list(made_on.values()),
        list(_unknown(store, layout)),
    )


def checked_sidecar(
    store: Store, manifest: RunManifest, shard: int, columns: Sequence[str] | None = None
) -> Sidecar | str:
    """The sidecar of a shard (or some of its columns), or why it cannot be used."""
    try:
        sidecar = read_sidecar(store, manifest.layout.sidecar(shard), columns)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return sidecar_fault(sidecar, manifest, shard) or sidecar


def shard_fault(store: Store, manifest: RunManifest, shard: int, check: Check) -> str | None:
    """What is wrong with a finished shard, or None.

    Args:
        check: "sha256" reads all of it; "size" compares its size; "none" reads the sidecar only.
    """
    sidecar = checked_sidecar(store, manifest, shard, ["index"])
    if isinstance(sidecar, str):
        return sidecar
    if check == "size" and manifest.layout.format != "files":
        name = manifest.layout.data(shard)
        size = store.size(name)
        if size is None:
            return f"{name} is missing"
        return None if size == sidecar.size else f"{name} has {size} bytes, not {sidecar.size}"
    return None if check == "none" else _data_fault(store, manifest, sidecar)


def _data_fault(store: Store, manifest: RunManifest, sidecar: Sidecar) -> str | None:
    name = manifest.layout.data(sidecar.shard)
    digest = shard_digest(store, name, manifest.layout.format)
    if digest is None:
        return f"{name} is missing"
    if (digest.size, digest.sha256) != (sidecar.size, sidecar.sha256):
        return f"{name} has other bytes than when it was written"
    return None


def audit_shard(store: Store, manifest: RunManifest, shard: int, decode: bool = True) -> ShardAudit:
    """Reads one shard and its sidecar."""
    layout, sidecar = manifest.layout, checked_sidecar(store, manifest, shard)
    if isinstance(sidecar, str):
        return ShardAudit(shard, (sidecar,))
    name = layout.data(shard)
    good = {row["key"]: row for row in sidecar.rows if row["status"] == OK}
    faults = []
    try:
        fault = _data_fault(store, manifest, sidecar)
        if fault is not None and fault.endswith("is missing"):
            return ShardAudit(shard, (fault,))
        faults += [fault] if fault else []
        faults += _image_faults(name, read_shard(store, name, layout.format), good, decode)
    except Exception as error:  # whatever a damaged file makes its reader raise
        reason = " ".join(str(error).split())[:200]
        faults.append(f"{name} cannot be read to its end ({type(error).__name__}: {reason})")
    return ShardAudit(
        shard,
        tuple(faults),
        len(good),
        np.array([hash(row["id"]) for row in good.values()], np.int64),
        dict(Counter(row["reason"] for row in sidecar.rows if row["status"] != OK)),
        sidecar.made_on,
    )


def _image_faults(
    name: str, images: Iterator[StoredImage], rows: Mapping[str, Mapping], decode: bool
) -> Iterator[str]:
    seen, changed, unknown, unreadable = set(), [], [], []
    for image in images:
        row = rows.get(image.key)
        if row is None or image.key in seen:
            unknown.append(image.key)
            continue
        seen.add(image.key)
        if hashlib.sha256(image.content).hexdigest() != row["sha256"]:
            changed.append(row["id"])
        if decode and readable_fault(image.content, row["width"], row["height"]):
            unreadable.append(row["id"])
    missing = [row["id"] for key, row in rows.items() if key not in seen]
    for ids, words in (
        (changed, "have other bytes than their sha256"),
        (unreadable, "cannot be read as images of their size"),
        (missing, "are missing"),
        (unknown, "are doubled or unknown"),
    ):
        if ids:
            more = f" and {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else ""
            yield f"{name}: {', '.join(ids[:SHOWN_IDS])}{more} {words}"


def _duplicates(
    store: Store, layout: ShardLayout, results: Sequence[ShardAudit]
) -> dict[str, list[int]]:
    """Ids that occur more than once. Hashes find the few that are then compared."""
    hashes = np.concatenate([result.ids for result in results] or [np.zeros(0, np.int64)])
    values, counts = np.unique(hashes, return_counts=True)
    doubtful = set(values[counts > 1].tolist())
    places: dict[str, list[int]] = {}
    for result in results if doubtful else ():
        if doubtful.isdisjoint(result.ids.tolist()):
            continue
        for row in read_sidecar(store, layout.sidecar(result.shard), ["id", "status"]).rows:
            if row["status"] == OK and hash(row["id"]) in doubtful:
                places.setdefault(row["id"], []).append(result.shard)
    return {name: shards for name, shards in places.items() if len(shards) > 1}


def _unknown(store: Store, layout: ShardLayout) -> Iterator[str]:
    for folder in (DATA, METADATA):
        for name in store.names(folder):
            if not name.endswith(PART) and layout.shard_of_file(name) is None:
                yield f"{folder}/{name}"
