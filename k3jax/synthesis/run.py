# SPDX-License-Identifier: Apache-2.0
"""The run of one process over its share of a data set: missing and damaged shards are made."""

import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from k3jax.model.tokenizer import PromptTruncatedWarning
from k3jax.sampling.samplers import make_sampler
from k3jax.synthesis.audit import Check, shard_fault
from k3jax.synthesis.batches import ShardBatches, batch_shard
from k3jax.synthesis.card import write_card
from k3jax.synthesis.engine import Engine, StopRequest, stop_on_signals
from k3jax.synthesis.metadata import finished_shards
from k3jax.synthesis.phases import LoadPipeline, Phases
from k3jax.synthesis.progress import Progress
from k3jax.synthesis.prompt_index import PromptIndex
from k3jax.synthesis.run_manifest import DATA, METADATA, METRICS, RunManifest, ShardLayout
from k3jax.synthesis.samples import RowRules, Sample
from k3jax.synthesis.shares import Share
from k3jax.synthesis.store import PART, LocalStore, Locks, Store


@dataclass(frozen=True)
class RunOptions:
    """Options of a process; none of them changes a byte of the data.

    Attributes:
        check: of the shards that are finished already.
        shards_per_phase: see `Phases`.
        grace: seconds from SIGTERM to the end of the process.
        metrics: local folder; None: metrics/ in the data set where that is local.
        prometheus: file; None: beside the JSON lines.
        image_folder: where relative paths of input images start.
    """

    share: Share = field(default_factory=lambda: Share(0, 1, ""))
    check: Check = "sha256"
    shards_per_phase: int | None = None
    grace: float = 30.0
    metrics: str | None = None
    prometheus: str | None = None
    progress: bool = False
    image_folder: str = "."


ReadSamples = Callable[[int], Sequence[Sample]]
"""Reads the samples of a shard."""


def samples_of(index: PromptIndex, rules: RowRules, manifest: RunManifest) -> ReadSamples:
    """Reads the samples of shards from the index of the prompts."""
    per_row = rules.images_per_prompt

    def read(shard: int) -> list[Sample]:
        first, stop = manifest.layout.range(shard)
        rows = index.read(first // per_row, -(-stop // per_row))
        samples = (sample for row in rows for sample in rules.expand(row))
        return [sample for sample in samples if first <= sample.index < stop]

    return read


def make_shards(
    store: Store,
    manifest: RunManifest,
    read_samples: ReadSamples,
    load: LoadPipeline,
    batch_size: int,
    options: RunOptions,
    only: Sequence[int] | None = None,
) -> tuple[int, Mapping[str, float]]:
    """Makes the missing and damaged shards of this process's share.

    Args:
        read_samples: reads those of a shard.
        load: see `Phases`.
        batch_size: images of the pipelines that `load` makes.
        only: make exactly these shards, finished or not.

    Returns:
        (exit code, `Progress.state`): 0 when the share is finished, 128 + n after signal n.

    Raises:
        ValueError: another process has this share; StorageError: it cannot be written.
    """
    layout, share = manifest.layout, options.share
    warnings.filterwarnings("ignore", category=PromptTruncatedWarning)
    stop, locks = StopRequest(options.grace), Locks(store)
    try:
        if not locks.take_share(share.worker, share.workers):
            raise ValueError(
                f"another process is working on share {share.worker} of {share.workers} of {store}:"
                " give each its own number (--job, --jobs), or stop one."
            )
        remove_parts(store, layout, locks)
        write_card(store, manifest)
        mine = list(share.shards(layout.shards)) if only is None else list(only)
        sizes = {shard: len(range(*layout.range(shard))) for shard in mine}
        finished = finished_shards(store, layout) if only is None else set()
        done = sum(sizes[shard] for shard in mine if shard in finished)

        def plans() -> Iterator[ShardBatches]:
            sampler = make_sampler(manifest.settings.sampler)
            todo = only
            if todo is None:
                todo = shards_to_make(store, manifest, mine, options.check)
            for shard in todo:
                yield batch_shard(shard, read_samples(shard), batch_size, sampler)

        phases = Phases(
            load,
            manifest.settings,
            plans,
            options.shards_per_phase,
            stopped=lambda: stop.requested is not None,
        )
        json_lines, prometheus = _metric_files(store, options)
        labels = {"job": "k3jax", "worker": str(share.worker), "host": socket.gethostname()}
        with (
            stop_on_signals(stop),
            Progress(
                sum(sizes.values()), done, labels, json_lines, prometheus, options.progress
            ) as progress,
        ):
            complete = Engine(
                store, manifest, phases, stop, progress, locks, options.image_folder
            ).run()
        return (0 if complete else stop.exit_code), progress.state()
    finally:
        locks.close()


def _metric_files(store: Store, options: RunOptions) -> tuple[Path | None, Path | None]:
    share = options.share
    folder = options.metrics
    if folder is None and isinstance(store, LocalStore):
        folder = store.root / METRICS
    name = f"worker-{share.worker:05d}-of-{share.workers:05d}"
    lines = None if folder is None else Path(folder).expanduser() / f"{name}.jsonl"
    if options.prometheus is not None:
        return lines, Path(os.path.expanduser(options.prometheus))
    return lines, None if lines is None else lines.with_suffix(".prom")


def shards_to_make(
    store: Store, manifest: RunManifest, shards: Sequence[int], check: Check
) -> Iterator[int]:
    """First the shards that are missing; then those that turn out to be damaged.

    A thread reads the finished shards while the missing ones are made.
    """
    finished = finished_shards(store, manifest.layout)
    old = [shard for shard in shards if shard in finished]
    with ThreadPoolExecutor(1, "check") as pool:
        try:
            faults = [pool.submit(shard_fault, store, manifest, s, check) for s in old]
            yield from (shard for shard in shards if shard not in finished)
            for shard, fault in zip(old, faults, strict=True):
                if fault.result() is not None:
                    note = f"k3jax: note: {fault.result()}: the shard is made again."
                    print(note, file=sys.stderr)
                    yield shard
        finally:
            pool.shutdown(cancel_futures=True)


def remove_parts(store: Store, layout: ShardLayout, locks: Locks) -> None:
    """Removes half-written files of killed processes. Shards that are being made are locked."""
    if not locks.work:
        return  # another process may be writing them
    for folder in (DATA, METADATA):
        for name in store.names(folder):
            stem = name[1:].split(".")[0]
            part = name.startswith(".") and name.endswith(PART) and stem.isdigit()
            if part and locks.take_shard(int(stem)):
                store.delete(f"{folder}/{name}")
                locks.release_shard(int(stem))
