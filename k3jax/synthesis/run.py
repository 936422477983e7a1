# SPDX-License-Identifier: Apache-2.0
"""A process's run over its share of a data set, from prompts to finished shards."""

import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from k3jax.model.tokenizer import PromptTruncatedWarning
from k3jax.sampling.samplers import make_sampler
from k3jax.synthesis.batches import ShardBatches, batch_shard
from k3jax.synthesis.card import write_card
from k3jax.synthesis.checking import Check, finished_shards, remove_leavings, shards_to_make
from k3jax.synthesis.engine import Engine
from k3jax.synthesis.layout import METRICS
from k3jax.synthesis.phases import Load, Phases
from k3jax.synthesis.progress import Progress
from k3jax.synthesis.prompt_index import PromptIndex
from k3jax.synthesis.run_manifest import Manifest
from k3jax.synthesis.samples import RowRules, Sample
from k3jax.synthesis.shares import Share
from k3jax.synthesis.stopping import Stop, stop_on_signals
from k3jax.synthesis.store import LocalStore, Locks, Store


@dataclass(frozen=True)
class Running:
    """How a run goes about its work; nothing of this changes a byte of the data.

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


Samples = Callable[[int], Sequence[Sample]]
"""The samples of a shard."""


def samples_of(index: PromptIndex, rules: RowRules, manifest: Manifest) -> Samples:
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
    manifest: Manifest,
    samples: Samples,
    load: Load,
    batch_size: int,
    running: Running,
    only: Sequence[int] | None = None,
) -> tuple[int, Mapping[str, float]]:
    """Makes what is missing or damaged of this process's share.

    Args:
        samples: reads those of a shard.
        load: see `Phases`.
        batch_size: images of the pipelines that `load` makes.
        only: make exactly these shards, whatever is there.

    Returns:
        (exit code, `Progress.state`): 0 when the share is finished, 128 + n after signal n.

    Raises:
        ValueError: another process has this share; StorageError: it cannot be written.
    """
    layout, share = manifest.layout, running.share
    warnings.filterwarnings("ignore", category=PromptTruncatedWarning)
    stop, locks = Stop(running.grace), Locks(store)
    try:
        if not locks.take_share(share.worker, share.workers):
            raise ValueError(
                f"another process is at work on share {share.worker} of {share.workers} of {store}:"
                " give each its own number (--job, --jobs), or stop one."
            )
        remove_leavings(store, layout, locks)
        write_card(store, manifest)
        mine = list(share.shards(layout.shards)) if only is None else list(only)
        sizes = {shard: len(range(*layout.range(shard))) for shard in mine}
        there = finished_shards(store, layout) if only is None else set()
        done = sum(sizes[shard] for shard in mine if shard in there)

        def plans() -> Iterator[ShardBatches]:
            sampler = make_sampler(manifest.settings.sampler)
            todo = only
            if todo is None:
                todo = shards_to_make(store, manifest, mine, running.check, _note)
            for shard in todo:
                yield batch_shard(shard, samples(shard), batch_size, sampler)

        phases = Phases(
            load,
            manifest.settings,
            plans,
            running.shards_per_phase,
            stopped=lambda: stop.requested is not None,
        )
        json_lines, prometheus = _metric_files(store, running)
        labels = {"job": "k3jax", "worker": str(share.worker), "host": socket.gethostname()}
        with (
            stop_on_signals(stop),
            Progress(
                sum(sizes.values()), done, labels, json_lines, prometheus, running.progress
            ) as progress,
        ):
            complete = Engine(
                store, manifest, phases, stop, progress, locks, running.image_folder
            ).run()
        return (0 if complete else stop.exit_code), progress.state()
    finally:
        locks.close()


def _metric_files(store: Store, running: Running) -> tuple[Path | None, Path | None]:
    share = running.share
    folder = running.metrics
    if folder is None and isinstance(store, LocalStore):
        folder = store.root / METRICS
    name = f"worker-{share.worker:05d}-of-{share.workers:05d}"
    lines = None if folder is None else Path(folder).expanduser() / f"{name}.jsonl"
    if running.prometheus is not None:
        return lines, Path(os.path.expanduser(running.prometheus))
    return lines, None if lines is None else lines.with_suffix(".prom")


def _note(text: str) -> None:
    print(f"k3jax: note: {text}", file=sys.stderr)
