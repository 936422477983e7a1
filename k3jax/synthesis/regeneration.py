# SPDX-License-Identifier: Apache-2.0
"""Computes samples or shards of a data set again, from its manifest and sidecars."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from k3jax.checkpoints.format import Checkpoint, read_checkpoint
from k3jax.sampling.samplers import make_sampler
from k3jax.synthesis.audit import checked_sidecar
from k3jax.synthesis.batches import batch_shard
from k3jax.synthesis.data_set import INSIDE, open_source
from k3jax.synthesis.image_formats import EncodedImage, encode_image
from k3jax.synthesis.input_images import read_inputs
from k3jax.synthesis.metadata import Sidecar, finished_shards
from k3jax.synthesis.phases import Phases
from k3jax.synthesis.run import ReadSamples, RunOptions, make_shards, samples_of
from k3jax.synthesis.run_manifest import RunManifest, differences, versions
from k3jax.synthesis.samples import Sample
from k3jax.synthesis.store import Store
from k3jax.synthesis.weights import Devices, Weights, loader


@dataclass(frozen=True)
class StoredSample:
    """A sample of a data set, and what is stored of it.

    Attributes:
        row: of its sidecar; None where its shard is not finished.
        made_on: see `Sidecar`.
    """

    sample: Sample
    row: Mapping[str, Any] | None
    made_on: Mapping[str, Any]


def weights_of(manifest: RunManifest, checkpoint: str | None, lora: str | None) -> Weights:
    """The weights of a data set.

    Args:
        checkpoint, lora: where they are now; None: where they were.

    Raises:
        ValueError: they do not exist, or are others.
    """
    places, identity = manifest.found_at, manifest.weights
    path = checkpoint or places["checkpoint"]
    try:
        weights = Weights(
            read_checkpoint(path), lora or places.get("lora"), identity.get("lora_scale", 1.0)
        )
    except ValueError as error:
        raise ValueError(f"{error} Name the folder of the weights with --checkpoint DIR.") from None
    found = differences(identity, weights.identity, "weights.")
    if found:
        raise ValueError(
            f"these are not the weights of the data set: {'; '.join(found)}. Name "
            "their folder with --checkpoint DIR."
        )
    return weights


class StoredSamples:
    """The samples of any shard, from its sidecar, or from the prompt files if it has none."""

    def __init__(
        self, store: Store, manifest: RunManifest, checkpoint: Checkpoint, paths: Sequence[str] = ()
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
        self._read_samples: ReadSamples | None = None

    def of_shard(self, shard: int) -> Sequence[Sample]:
        sidecar = self.sidecar(shard)
        if sidecar is not None:
            return [sample_of(row) for row in sidecar.rows]
        return self._from_prompts(shard)

    def sidecar(self, shard: int) -> Sidecar | None:
        """The sidecar of a shard if there is one without a fault."""
        sidecar = checked_sidecar(self._store, self._manifest, shard)
        return None if isinstance(sidecar, str) else sidecar

    def find(self, ids: Sequence[str]) -> dict[str, StoredSample]:
        """Samples by their ids, from the sidecars first, and then from the prompt files.

        Raises:
            ValueError: there is no such sample, or it is a bad line.
        """
        layout, found, left = self._manifest.layout, {}, set(ids)
        unread = set(range(layout.shards))
        for shard in sorted(finished_shards(self._store, layout)):
            if left and (sidecar := self.sidecar(shard)) is not None:
                unread.discard(shard)
                for row in sidecar.rows:
                    if row["id"] in left:
                        found[row["id"]] = StoredSample(sample_of(row), row, sidecar.made_on)
                        left.discard(row["id"])
        for shard in sorted(unread):
            for sample in self.of_shard(shard) if left else ():
                if sample.id in left:
                    found[sample.id] = StoredSample(sample, None, {})
                    left.discard(sample.id)
        if left:
            raise ValueError(f"{self._store} has no sample {sorted(left)[0]!r}.")
        bad = [f.sample for f in found.values() if f.sample.fault is not None]
        if bad:
            raise ValueError(f"{bad[0].id} has no image: {bad[0].fault}.")
        return found

    def _from_prompts(self, shard: int) -> Sequence[Sample]:
        if self._read_samples is None:
            manifest = self._manifest
            kind = manifest.found_at["prompts_format"]
            source = open_source(self._paths, manifest.settings, self._rules, kind)
            index = source.index(self._store)
            files = [{k: f[k] for k in ("rows", "sha256")} for f in index.summary.files]
            if found := differences(manifest.identity["prompts"]["files"], files, "file "):
                raise ValueError(
                    f"the prompts are no longer those of the data set: {'; '.join(found)}. Name "
                    "the right files with --prompts."
                )
            self._read_samples = samples_of(index, self._rules, manifest)
        return self._read_samples(shard)


def sample_of(row: Mapping[str, Any]) -> Sample:
    """The sample of a row of a sidecar. A good line has no fault, even if its image failed."""
    if row["prompt"] is None:
        return Sample(row["index"], row["id"], row["line"], fault=row["reason"])
    names = {field.name for field in dataclasses.fields(Sample)} - {"fault"}
    return Sample(**{name: row[name] for name in names & row.keys()})


def devices_as_recorded(
    made_on: Mapping[str, Any],
    mesh: str | None,
    batch_size: int | None,
    stream_text_encoder: bool = False,
) -> Devices:
    """The devices of this host, used so that the pixels are the same as before.

    Args:
        made_on: see `Sidecar`.
        mesh, batch_size: others instead.
        stream_text_encoder: see `Devices`.
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


def regenerate(
    manifest: RunManifest,
    weights: Weights,
    samples: Sequence[Sample],
    devices: Devices,
) -> dict[str, EncodedImage]:
    """The images of samples by their ids, encoded as in the data set."""
    settings, images = manifest.settings, {}
    shard = batch_shard(0, samples, devices.batch_size, make_sampler(settings.sampler))
    phases = Phases(loader(weights, settings, devices), settings, lambda: iter([shard]))
    for encoded in phases:
        for batch in shard.batches:
            inputs = None
            if batch.kind.operation != "text":
                inputs = [read_inputs(s, manifest.found_at["images"]) for s in batch.samples]
                if faults := [source for source in inputs if isinstance(source, str)]:
                    raise ValueError(f"{faults[0]}.")
            pixels = phases.images(encoded, batch, inputs)
            for sample, image in zip(batch.samples, pixels, strict=True):
                images[sample.id] = encode_image(image, settings.encoding)
    return images


def repair(
    store: Store,
    manifest: RunManifest,
    weights: Weights,
    samples: StoredSamples,
    shards: Sequence[int],
    devices_for: Callable[[Mapping[str, Any]], Devices],
    options: RunOptions,
) -> int:
    """Makes shards again; the exit code.

    Args:
        devices_for: `Sidecar.made_on` -> this host's devices, used in the same way.

    Raises:
        ValueError: the installed versions would make other bytes.
    """
    found = differences(dict(manifest.versions), versions(), "versions.")
    if found:
        raise ValueError(
            f"the data set was made with other versions ({'; '.join(found)}): repair it with those."
        )
    sidecars = (samples.sidecar(s) for s in range(manifest.layout.shards))
    made_on = next((s.made_on for s in sidecars if s is not None), {})
    devices = devices_for(made_on)
    # Read before they are deleted, one by one, as each shard is begun.
    load = loader(weights, manifest.settings, devices)
    size = devices.batch_size
    code, _ = make_shards(store, manifest, samples.of_shard, load, size, options, only=shards)
    return code
