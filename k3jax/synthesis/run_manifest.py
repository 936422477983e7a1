# SPDX-License-Identifier: Apache-2.0
"""manifest.json: what every byte of a data set is a function of.

It is written once, by whichever process comes first, and holds nothing of time or place except
where the checkpoint and the prompts were found, which does not count.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, get_args

from k3jax.config import ModelConfig, SamplerConfig, from_dict, to_dict
from k3jax.pipelines import call_inputs
from k3jax.sampling.samplers import make_sampler
from k3jax.synthesis.encoding import ImageFormat, codec_version
from k3jax.synthesis.layout import MANIFEST, Format, Layout
from k3jax.synthesis.prompt_source import PromptIndex
from k3jax.synthesis.samples import RowRules
from k3jax.synthesis.storage import Store, read_bytes


VERSION = 1
PACKAGES = ("k3jax", "jax", "jaxlib", "libtpu", "numpy", "pillow", "pyarrow")
IDENTITY = ("weights", "prompts", "settings", "versions")


@dataclass(frozen=True)
class Settings:
    """What is made, in what form.

    Attributes:
        quality: of lossy images; None for lossless ones.
        seed: of the run; those of the samples come from it.
        buckets: see `RowRules`.
        sampler: with the number of steps and the guidance of rows that name none.
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
    guidance_interval: tuple[int, int] | None
    conditioning: str
    dtype: str
    param_dtype: str
    columns: tuple[str, ...]
    skip_bad: bool
    strength: float | None = None
    int8_text_encoder: bool = False

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
class Manifest:
    """
    Attributes:
        weights: the checkpoint's fingerprint.
        prompts: sha256 and rows of every prompt file, and the tasks that they ask for.
        found_at: where the checkpoint and the prompts were; not part of the fingerprint.
    """

    weights: Mapping[str, Any]
    prompts: Mapping[str, Any]
    settings: Settings
    versions: Mapping[str, str]
    found_at: Mapping[str, Any]

    @property
    def layout(self) -> Layout:
        settings = self.settings
        samples = self.prompts["rows"] * settings.images_per_prompt
        return Layout(samples, settings.samples_per_shard, settings.format)

    @property
    def fingerprint(self) -> str:
        """sha256 of all that a data set is a function of."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @property
    def identity(self) -> dict[str, Any]:
        settings = to_dict(self.settings)
        prompts = {**self.prompts, "files": [_content(f) for f in self.prompts["files"]]}
        values = {"weights": self.weights, "prompts": prompts, "settings": settings}
        return json.loads(json.dumps({**values, "versions": self.versions}))

    def to_json(self) -> bytes:
        values = {
            "data_set_version": VERSION,
            "fingerprint": self.fingerprint,
            "samples": self.layout.samples,
            "shards": self.layout.shards,
            **dataclasses.asdict(self),
            "settings": to_dict(self.settings),
        }
        return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode()


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of '1024x768'."""
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise ValueError(f"size {text!r} is not WIDTHxHEIGHT, such as 1024x768.")
    return int(width), int(height)


def prompts_entry(index: PromptIndex) -> dict[str, Any]:
    files = [{"name": f.name, "rows": f.rows, "sha256": f.sha256} for f in index.files]
    return {"rows": index.rows, "tasks": list(index.tasks), "files": files}


def versions() -> dict[str, str]:
    """Of everything that has a say in the bytes."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found | {"codecs": codec_version()}


def read_manifest(store: Store) -> Manifest:
    """The manifest of a data set.

    Raises:
        ValueError: there is none, or it is damaged, or of another version.
    """
    try:
        content = read_bytes(store, MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{store} is not a data set of k3jax: it has no {MANIFEST}.") from None
    try:
        values = json.loads(content)
        if values["data_set_version"] != VERSION:
            raise ValueError(f"it is of version {values['data_set_version']}, not {VERSION}")
        manifest = Manifest(
            **{
                name: from_dict(Settings, value) if name == "settings" else value
                for name, value in values.items()
                if name in {field.name for field in dataclasses.fields(Manifest)}
            }
        )
        if manifest.settings.format not in get_args(Format):
            raise ValueError(f"unknown format {manifest.settings.format!r}")
        if manifest.fingerprint != values["fingerprint"]:
            raise ValueError("its fingerprint is not that of its content: it was changed by hand")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{store}/{MANIFEST} is damaged ({error}): bring the old one back, or start the same "
            "run in another folder."
        ) from None
    return manifest


def write_or_compare(store: Store, manifest: Manifest) -> None:
    """Records what is made, or checks that the folder's data set is this one.

    Raises:
        ValueError: it is another one, with everything that differs.
    """
    if store.create_new(MANIFEST, manifest.to_json()):
        return
    recorded = read_manifest(store)
    found = differences(recorded.identity, manifest.identity)
    if found:
        raise ValueError(
            f"{store} holds another data set: {'; '.join(found)}. Take another folder, or run "
            "with what its manifest says."
        )


def differences(old: Any, new: Any, prefix: str = "", limit: int = 8) -> list[str]:
    """'settings.seed is 1 and was 0', ...: where two identities differ."""
    before, after = _flat(old, prefix), _flat(new, prefix)
    found = [
        f"{name} is {json.dumps(after.get(name))} and was {json.dumps(before.get(name))}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]
    return found if len(found) <= limit else [*found[:limit], f"{len(found) - limit} more"]


def _content(file: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt file without its name: it is the same under another."""
    return {key: file[key] for key in ("rows", "sha256")}


def _flat(value: Any, prefix: str) -> dict[str, Any]:
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list) and any(isinstance(v, Mapping | list) for v in value):
        items = enumerate(value)
    else:
        return {prefix.removesuffix("."): value}
    return {n: leaf for key, child in items for n, leaf in _flat(child, f"{prefix}{key}.").items()}
