# SPDX-License-Identifier: Apache-2.0
"""Which shards are finished and whole, and which are to be made."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from k3jax.synthesis.layout import DATA, METADATA, Layout
from k3jax.synthesis.run_manifest import Manifest
from k3jax.synthesis.shard_formats import shard_digest
from k3jax.synthesis.sidecar import Sidecar, read_sidecar
from k3jax.synthesis.store import PART, Locks, Store


Check = Literal["sha256", "size", "none"]


def finished_shards(store: Store, layout: Layout) -> set[int]:
    """The shards that have a sidecar."""
    found = (layout.shard_named(name) for name in store.names(METADATA) if name.endswith("parquet"))
    return {shard for shard in found if shard is not None}


def shard_fault(store: Store, manifest: Manifest, shard: int, check: Check) -> str | None:
    """What is wrong with a finished shard, or None.

    Args:
        check: "sha256" reads all of it; "size" asks how large it is; "none" reads the sidecar only.
    """
    layout = manifest.layout
    try:
        sidecar = read_sidecar(store, layout.sidecar(shard), ["index"])
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    fault = sidecar_fault(sidecar, manifest, shard)
    if fault is not None or check == "none":
        return fault
    name = layout.data(shard)
    if check == "size" and layout.format != "files":
        size = store.size(name)
        if size is None:
            return f"{name} is missing"
        return None if size == sidecar.size else f"{name} has {size} bytes, not {sidecar.size}"
    digest = shard_digest(store, name, layout.format)
    if digest is None:
        return f"{name} is missing"
    if (digest.size, digest.sha256) != (sidecar.size, sidecar.sha256):
        return f"{name} has other bytes than when it was written"
    return None


def sidecar_fault(sidecar: Sidecar, manifest: Manifest, shard: int) -> str | None:
    """Whether a sidecar is that of the shard it lies beside, with a row for every sample."""
    layout = manifest.layout
    name = layout.sidecar(shard)
    if sidecar.run != manifest.fingerprint:
        return f"{name} is of another data set"
    if sidecar.shard != shard:
        return f"{name} is that of shard {sidecar.shard}"
    if [row["index"] for row in sidecar.rows] != list(range(*layout.range(shard))):
        return f"{name} has not one row for each of its samples"
    return None


def shards_to_make(
    store: Store, manifest: Manifest, shards: Sequence[int], check: Check, say
) -> Iterator[int]:
    """First the shards that are missing; then those that turn out to be damaged.

    Finished shards are read while the missing ones are being made, by a thread of their own.

    Args:
        say: called with a sentence for each damaged shard.
    """
    finished = finished_shards(store, manifest.layout)
    missing = [shard for shard in shards if shard not in finished]
    there = [shard for shard in shards if shard in finished]
    with ThreadPoolExecutor(1, "check") as pool:
        try:
            faults = [pool.submit(shard_fault, store, manifest, s, check) for s in there]
            yield from missing
            for shard, fault in zip(there, faults, strict=True):
                if fault.result() is not None:
                    say(f"{fault.result()}: the shard is made again.")
                    yield shard
        finally:
            pool.shutdown(cancel_futures=True)


def remove_leavings(store: Store, layout: Layout, locks: Locks) -> None:
    """Removes what killed processes have left half-written. A shard in work is locked."""
    if not locks.work:
        return  # what looks left over may be in work
    for folder in (DATA, METADATA):
        for name in store.names(folder):
            if not (name.startswith(".") and name.endswith(PART)):
                continue
            stem = name[1:].split(".")[0]
            if stem.isdigit() and locks.take_shard(int(stem)):
                store.delete(f"{folder}/{name}")
                locks.release_shard(int(stem))
