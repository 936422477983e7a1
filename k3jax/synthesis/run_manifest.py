# SPDX-License-Identifier: Apache-2.0
"""manifest.json: everything that a data set is a function of, and the names of its files.

manifest.json              written once, by the first process
prompts-index.parquet      the checked rows of the prompt files
data/000012.tar            shard 12 (.tar, .parquet, or a folder)
metadata/000012.parquet    its sidecar, written last: a shard that has one is finished
metrics/                   progress of the processes; not part of the data

The manifest has no times, and the places of the checkpoint and the prompts are not part of its
fingerprint.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, get_args

from k3jax.config import ModelConfig, SamplerConfig, from_dict, to_dict
from k3jax.pipelines import call_inputs
from k3jax.pipelines.option_fields import config_fields
from k3jax.pipelines.options import TextToImageOptions
from k3jax.sampling.samplers import make_sampler
from k3jax.synthesis.image_formats import ImageFormat, codec_version
from k3jax.synthesis.prompt_index import Summary
from k3jax.synthesis.samples import RowRules
from k3jax.synthesis.store import Store


Format = Literal["webdataset", "parquet", "files"]

MANIFEST = "manifest.json"
DATA, METADATA, METRICS = "data", "metadata", "metrics"
ENDINGS = {"webdataset": ".tar", "parquet": ".parquet", "files": ""}
VERSION = 1
PACKAGES = ("k3jax", "jax", "jaxlib", "libtpu", "numpy", "pillow", "pyarrow")

CALL_OPTIONS = tuple(
    field
    for field in config_fields("generate", TextToImageOptions)
    if field[0]
    # These are in `SamplerConfig`, or belong to samples.
    not in {
        *("sampler", "num_inference_steps", "guidance_scale", "eta"),
        *("negative_prompt", "height", "width", "num_images_per_prompt", "seed"),
    }
)
"""(name, type, default) of the other options of a pipeline call. Each is a field of `Settings`."""


@dataclass(frozen=True, kw_only=True)
class Settings(make_dataclass("CallSettings", CALL_OPTIONS, frozen=True, kw_only=True)):
    """What images are computed, and how they are stored.

    Attributes:
        quality: of lossy images; None for lossless ones.
        seed: of the run; those of the samples are derived from it.
        buckets: see `RowRules`.
        sampler: with the number of steps, and the guidance of rows that name none.
        columns: known column -> its name in the prompt files, where they differ.
        skip_bad: bad lines are failed samples.
        strength: of rows with an image that name none.
    """

    format: Format
    image_format: str
    quality: int | None
    samples_per_shard: int
    images_per_prompt: int
    seed: int
    width: int
    height: int
    buckets: tuple[str, ...]
    negative_prompt: str | None
    sampler: SamplerConfig
    conditioning: str
    dtype: str
    param_dtype: str
    columns: tuple[str, ...]
    skip_bad: bool
    strength: float | None = None
    int8_text_encoder: bool = False

    @property
    def call_options(self) -> dict[str, Any]:
        """The options of every call of a pipeline, beyond the sampler and those of samples."""
        return {name: getattr(self, name) for name, *_ in CALL_OPTIONS}

    def row_rules(self, model: ModelConfig) -> RowRules:
        """What rows are checked against, for a checkpoint's model."""
        return RowRules(
            self.seed,
            self.images_per_prompt,
            self.width,
            self.height,
            self.sampler.guidance_scale,
            self.negative_prompt,
            call_inputs.size_multiple(model),
            tuple(parse_size(size) for size in self.buckets),
            make_sampler(self.sampler).num_steps,
            self.strength,
            model.unet.in_channels != model.movq.latent_channels,
        )

    @property
    def encoding(self) -> ImageFormat:
        return ImageFormat(self.image_format, self.quality)


@dataclass(frozen=True)
class ShardLayout:
    """Names of the shards' files, and which samples each holds."""

    samples: int
    samples_per_shard: int
    format: Format

    @property
    def shards(self) -> int:
        return -(-self.samples // self.samples_per_shard)

    def range(self, shard: int) -> tuple[int, int]:
        """First sample of a shard, and the one after its last."""
        first = shard * self.samples_per_shard
        return first, min(first + self.samples_per_shard, self.samples)

    def name(self, shard: int) -> str:
        return f"{shard:0{max(6, len(str(self.shards - 1)))}d}"

    def data(self, shard: int) -> str:
        return f"{DATA}/{self.name(shard)}{ENDINGS[self.format]}"

    def sidecar(self, shard: int) -> str:
        return f"{METADATA}/{self.name(shard)}.parquet"

    def shard_of_file(self, file: str) -> int | None:
        """The shard of a file in data/ or metadata/; None for any other file."""
        stem = file.split(".")[0]
        if not stem.isdigit():
            return None
        shard = int(stem)
        names = (self.data(shard).split("/")[1], self.sidecar(shard).split("/")[1])
        return shard if shard < self.shards and file in names else None


@dataclass(frozen=True)
class RunManifest:
    """The content of manifest.json.

    Attributes:
        weights: the checkpoint's fingerprint.
        prompts: sha256 and rows of every prompt file, and the tasks that they ask for.
        found_at: where the checkpoint and the prompts were; not part of the fingerprint.
        added_columns: metadata columns beyond those of the first version; not part of it either.
    """

    weights: Mapping[str, Any]
    prompts: Mapping[str, Any]
    settings: Settings
    versions: Mapping[str, str]
    found_at: Mapping[str, Any]
    added_columns: Sequence[str] = ()
    stored_fingerprint: str | None = None

    @property
    def layout(self) -> ShardLayout:
        settings = self.settings
        samples = self.prompts["rows"] * settings.images_per_prompt
        return ShardLayout(samples, settings.samples_per_shard, settings.format)

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that a data set is a function of.

        Of a stored manifest, the one in the file: it may lack settings that came later.
        """
        return self.stored_fingerprint or _fingerprint(self.identity)

    @property
    def identity(self) -> dict[str, Any]:
        return _identity(self._values())

    def to_json(self) -> bytes:
        values = {
            "data_set_version": VERSION,
            "fingerprint": self.fingerprint,
            "samples": self.layout.samples,
            "shards": self.layout.shards,
            **self._values(),
        }
        return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode()

    def _values(self) -> dict[str, Any]:
        values = {**vars(self), "settings": to_dict(self.settings)}
        del values["stored_fingerprint"]
        return values


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of '1024x768'."""
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise ValueError(f"size {text!r} is not WIDTHxHEIGHT, such as 1024x768.")
    return int(width), int(height)


def prompts_entry(summary: Summary) -> dict[str, Any]:
    """What a manifest holds of the prompts."""
    rows = sum(file["rows"] for file in summary.files)
    return {"rows": rows, "tasks": summary.tasks, "files": summary.files}


def versions() -> dict[str, str]:
    """Of the packages that decide on the bytes."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found | {"codecs": codec_version()}


def read_manifest(store: Store) -> RunManifest:
    """The manifest of a data set.

    Raises:
        ValueError: there is none, or it is damaged, or of another version.
    """
    try:
        content = store.read(MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{store} is not a data set of k3jax: it has no {MANIFEST}.") from None
    try:
        values = json.loads(content)
        if values["data_set_version"] != VERSION:
            raise ValueError(f"it is of version {values['data_set_version']}, not {VERSION}")
        if _fingerprint(_identity(values)) != values["fingerprint"]:
            raise ValueError("its fingerprint is not that of its content: it was changed by hand")
        names = {field.name for field in dataclasses.fields(RunManifest)} & values.keys()
        known = {name: values[name] for name in names}
        known |= {"settings": from_dict(Settings, values["settings"])}
        manifest = RunManifest(**known, stored_fingerprint=values["fingerprint"])
        if manifest.settings.format not in get_args(Format):
            raise ValueError(f"unknown format {manifest.settings.format!r}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{store}/{MANIFEST} is damaged ({error}): bring the old one back, or start the same "
            "run in another folder."
        ) from None
    return manifest


def write_or_compare(store: Store, manifest: RunManifest) -> RunManifest:
    """Writes the manifest of a new data set, or checks that the folder's data set is this one.

    Returns:
        The manifest that is stored.

    Raises:
        ValueError: it is another one, with everything that differs.
    """
    if store.create_new(MANIFEST, manifest.to_json()):
        return dataclasses.replace(manifest, stored_fingerprint=manifest.fingerprint)
    recorded = read_manifest(store)
    found = differences(recorded.identity, manifest.identity)
    if found:
        raise ValueError(
            f"{store} holds another data set: {'; '.join(found)}. Take another folder, or run "
            "with the settings in its manifest."
        )
    return dataclasses.replace(recorded, found_at=manifest.found_at)


def differences(old: Any, new: Any, prefix: str = "", limit: int = 8) -> list[str]:
    """'settings.seed is 1 and was 0', ...: where two identities differ."""
    before, after = _flat(old, prefix), _flat(new, prefix)
    found = [
        f"{name} is {json.dumps(after.get(name))} and was {json.dumps(before.get(name))}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]
    return found if len(found) <= limit else [*found[:limit], f"{len(found) - limit} more"]


def _identity(values: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a manifest's values that the data set is a function of."""
    identity = {name: values[name] for name in ("weights", "prompts", "settings", "versions")}
    # The names of prompt files are not part of it.
    files = [{key: file[key] for key in ("rows", "sha256")} for file in values["prompts"]["files"]]
    identity["prompts"] = {**values["prompts"], "files": files}
    return json.loads(json.dumps(identity))


def _fingerprint(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _flat(value: Any, prefix: str) -> dict[str, Any]:
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list) and any(isinstance(v, Mapping | list) for v in value):
        items = enumerate(value)
    else:
        return {prefix.removesuffix("."): value}
    return {n: leaf for key, child in items for n, leaf in _flat(child, f"{prefix}{key}.").items()}
