# SPDX-License-Identifier: Apache-2.0
"""Making parts of a data set again from what it says of itself."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from k3jax.checkpoints.format import Checkpoint, read_checkpoint
from k3jax.sampling.samplers import make_sampler
from k3jax.synthesis.batches import batch_shard
from k3jax.synthesis.checking import finished_shards, sidecar_fault
from k3jax.synthesis.data_set import INSIDE, open_source
from k3jax.synthesis.image_formats import Encoded, encode_image
from k3jax.synthesis.input_images import read_inputs
from k3jax.synthesis.phases import Phases
from k3jax.synthesis.run import Running, make_shards, samples_of
from k3jax.synthesis.run_manifest import Manifest, differences, versions
from k3jax.synthesis.samples import Sample
from k3jax.synthesis.sidecar import Sidecar, read_sidecar
from k3jax.synthesis.store import Store
from k3jax.synthesis.weights import Devices, Weights, loader


@dataclass(frozen=True)
class Found:
    """A sample of a data set.

    Attributes:
        row: what its sidecar says; None where its shard is not finished.
        made_on: see `Sidecar`.
    """

    sample: Sample
    row: Mapping[str, Any] | None
    made_on: Mapping[str, Any]


def weights_of(manifest: Manifest, checkpoint: str | None, lora: str | None) -> Weights:
    """The weights of a data set.

    Args:
        checkpoint, lora: where they are now; None: where they were.

    Raises:
        ValueError: they are not there, or are others.
    """
    places, identity = manifest.found_at, manifest.weights
    path = checkpoint or places["checkpoint"]
    try:
        weights = Weights(
            read_checkpoint(path), lora or places.get("lora"), identity.get("lora_scale", 1.0)
        )
    except ValueError as error:
        raise ValueError(f"{error} Say where the weights are with --checkpoint DIR.") from None
    found = differences(identity, weights.identity, "weights.")
    if found:
        raise ValueError(
            f"these are not the weights of the data set: {'; '.join(found)}. Say where those are "
            "with --checkpoint DIR."
        )
    return weights


class Prompts:
    """The samples of any shard: of its sidecar, or read from the prompt files anew."""

    def __init__(
        self, store: Store, manifest: Manifest, checkpoint: Checkpoint, paths: Sequence[str] = ()
    ):
        """
        Args:
            paths: where the prompt files are now; empty: where they were.
        """
        self._store, self._manifest = store, manifest
        self._rules = manifest.settings.row_rules(checkpoint.config)
        recorded = manifest.found_at["prompts"]
        self._paths = list(paths) or [
            f"{store}/{p.removeprefix(INSIDE)}" if p.startswith(INSIDE) else p for p in recorded
        ]
        self._opened = None

    def of_shard(self, shard: int) -> list[Sample]:
        sidecar = self.sidecar(shard)
        if sidecar is not None:
            return [sample_of(row) for row in sidecar.rows]
        return self._open()(shard)

    def sidecar(self, shard: int) -> Sidecar | None:
        """The sidecar of a shard if it can be relied on."""
        try:
            sidecar = read_sidecar(self._store, self._manifest.layout.sidecar(shard))
        except (ValueError, FileNotFoundError):
            return None
        return sidecar if sidecar_fault(sidecar, self._manifest, shard) is None else None

    def find(self, wanted: Sequence[str]) -> dict[str, Found]:
        """Samples by their ids. Sidecars are looked through first, then the prompt files.

        Raises:
            ValueError: there is no such sample, or it cannot be made.
        """
        layout, found, left = self._manifest.layout, {}, set(wanted)
        unread = set(range(layout.shards))
        for shard in sorted(finished_shards(self._store, layout)):
            if left and (sidecar := self.sidecar(shard)) is not None:
                unread.discard(shard)
                for row in sidecar.rows:
                    if row["id"] in left:
                        found[row["id"]] = Found(sample_of(row), row, sidecar.made_on)
                        left.discard(row["id"])
        for shard in sorted(unread):
            for sample in self.of_shard(shard) if left else ():
                if sample.id in left:
                    found[sample.id] = Found(sample, None, {})
                    left.discard(sample.id)
        if left:
            raise ValueError(f"{self._store} has no sample {sorted(left)[0]!r}.")
        bad = [f.sample for f in found.values() if f.sample.fault is not None]
        if bad:
            raise ValueError(f"{bad[0].id} cannot be made: {bad[0].fault}.")
        return found

    def _open(self):
        if self._opened is None:
            manifest = self._manifest
            kind = manifest.found_at["prompts_format"]
            source = open_source(self._paths, manifest.settings, self._rules, kind)
            index = source.index(self._store)
            now = [{k: f[k] for k in ("rows", "sha256")} for f in index.summary.files]
            then = manifest.identity["prompts"]["files"]
            if found := differences(then, now, "file "):
                raise ValueError(
                    f"the prompts are not those of the data set any more: {'; '.join(found)}. Say "
                    "where those are with --prompts."
                )
            self._opened = samples_of(index, self._rules, manifest)
        return self._opened


def sample_of(row: Mapping[str, Any]) -> Sample:
    """The sample that a row of a sidecar is of. Only bad lines are hopeless, not accidents."""
    if row["prompt"] is None:
        return Sample(row["index"], row["id"], row["line"], fault=row["reason"])
    names = (field.name for field in dataclasses.fields(Sample) if field.name != "fault")
    return Sample(**{name: row[name] for name in names})


def devices_as_recorded(
    made_on: Mapping[str, Any],
    mesh: str | None,
    batch_size: int | None,
    stream_text_encoder: bool = False,
) -> Devices:
    """Those by which pixels come out as they did, on however many devices.

    Args:
        made_on: see `Sidecar`.
        mesh, batch_size: others instead.
        stream_text_encoder: see `Devices`; no part of a data set.
    """

    def recorded(name):
        sizes = made_on.get(name)
        return sizes and ",".join(["data=-1", *(f"{axis}={n}" for axis, n in sizes.items())])

    devices = Devices.local(
        mesh or recorded("mesh") or "data=-1",
        None if mesh else recorded("encoder_mesh"),
        made_on.get("images_per_device"),
        stream_text_encoder,
    )
    return devices.with_batch_size(batch_size)


def remake_images(
    manifest: Manifest,
    weights: Weights,
    samples: Sequence[Sample],
    devices: Devices,
) -> dict[str, Encoded]:
    """Images of samples by their ids, encoded as in the data set."""
    settings = manifest.settings
    plan = batch_shard(0, samples, devices.batch_size, make_sampler(settings.sampler))
    phases = Phases(loader(weights, settings, devices), settings, lambda: iter([plan]))
    made = {}
    for prepared in phases:
        for batch in plan.batches:
            inputs = None
            if batch.bucket.operation != "text":
                inputs = [read_inputs(s, manifest.found_at["images"]) for s in batch.samples]
                bad = [given for given in inputs if isinstance(given, str)]
                if bad:
                    raise ValueError(f"{bad[0]}.")
            images = phases.make(prepared, batch, inputs)
            for sample, image in zip(batch.samples, images, strict=True):
                made[sample.id] = encode_image(image, settings.encoding)
    return made


def repair(
    store: Store,
    manifest: Manifest,
    weights: Weights,
    prompts: Prompts,
    shards: Sequence[int],
    devices_for: Callable[[Mapping[str, Any]], Devices],
    running: Running,
) -> int:
    """Makes shards again; the exit code.

    Args:
        devices_for: what finished shards were made on -> this host's devices, used alike.

    Raises:
        ValueError: the versions here would make other bytes.
    """
    found = differences(dict(manifest.versions), versions(), "versions.")
    if found:
        raise ValueError(
            f"the data set was made with other versions ({'; '.join(found)}): repair it with those."
        )
    sidecars = (prompts.sidecar(s) for s in range(manifest.layout.shards))
    made_on = next((s.made_on for s in sidecars if s is not None), {})
    devices = devices_for(made_on)
    # Read before they are deleted, one by one, as each shard is begun.
    load = loader(weights, manifest.settings, devices)
    size = devices.batch_size
    code, _ = make_shards(store, manifest, prompts.of_shard, load, size, running, only=shards)
    return code
