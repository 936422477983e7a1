# SPDX-License-Identifier: Apache-2.0
"""The metadata of a data set's samples: the table of its columns, and the Parquet sidecars.

A column is one entry of `COLUMNS`; sidecars, the records in shards, the data card and the gallery
read it from there. A shard's sidecar is written after the shard, and a shard that has one is
finished, so the two files need not appear at the same moment.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from k3jax.config import SamplerConfig
from k3jax.synthesis.image_formats import EncodedImage
from k3jax.synthesis.input_images import InputImages
from k3jax.synthesis.phases import Embeddings
from k3jax.synthesis.run_manifest import METADATA, RunManifest, ShardLayout
from k3jax.synthesis.samples import Sample, key_of
from k3jax.synthesis.store import Store


OK, FAILED = "ok", "failed"
_KEY = b"k3jax"


@dataclass(frozen=True)
class Result:
    """How the work on a sample ended.

    Attributes:
        image: its file, or why there is none.
        sampler: of the data set.
        embeddings: of the texts of its shard.
        inputs: the images that it started from.
    """

    sample: Sample
    image: EncodedImage
    sampler: SamplerConfig
    embeddings: Embeddings | None = None
    inputs: InputImages | None = None

    @property
    def tokens(self) -> int:
        return self.embeddings.tokens(self.sample.prompt)

    def input_digest(self, name: str) -> str | None:
        return None if self.inputs is None else self.inputs.sha256.get(name)


@dataclass(frozen=True)
class Column:
    """A column of the metadata.

    Attributes:
        name: in sidecars.
        type: of Arrow.
        description: for people, in the data card.
        value: computes it from the result of a sample.
        always: bad lines of a prompt file have it too; others have nulls there.
        shard: its name in shards; None: it is in sidecars only.
        inputs: it is in shards only where samples start from images.
        caption: its name in the gallery; None: it is not shown there.
        added: younger than the first version; only data sets whose manifest names it have it.
    """

    name: str
    type: pa.DataType
    description: str
    value: Callable[[Result], Any]
    always: bool = False
    shard: str | None = None
    inputs: bool = False
    caption: str | None = None
    added: bool = False


def _sample(name: str, type: pa.DataType, description: str, **options) -> Column:
    """A column that is a field of `Sample`."""
    options = {"shard": name, **options}
    return Column(name, type, description, lambda result: getattr(result.sample, name), **options)


_INT, _FLOAT, _TEXT = pa.int64(), pa.float64(), pa.string()
_SIZE = pa.int32()

COLUMNS = (
    _sample("index", _INT, "place in the data set, from 0", always=True),
    _sample("id", _TEXT, "of the prompt file, or its line", always=True, caption="id"),
    Column("key", _TEXT, "name of its files", lambda r: key_of(r.sample.id), always=True),
    _sample("line", _INT, "of the prompt file, from 1", always=True),
    _sample("prompt", _TEXT, "", caption="prompt"),
    _sample("negative_prompt", _TEXT, "", caption="negative"),
    _sample("seed", _INT, "of its noise", caption="seed"),
    Column(
        "steps", _SIZE, "of the sampler", lambda r: r.sampler.num_inference_steps, shard="steps"
    ),
    _sample("guidance_scale", _FLOAT, "", caption="guidance"),
    Column("sampler", _TEXT, "", lambda r: r.sampler.name, shard="sampler"),
    _sample("width", _SIZE, "in pixels", caption="width"),
    _sample("height", _SIZE, "in pixels", caption="height"),
    _sample("image", _TEXT, "file that it starts from", shard="input_image", inputs=True),
    _sample("mask", _TEXT, "file of the inpainting mask", shard="input_mask", inputs=True),
    _sample("strength", _FLOAT, "how much of the image is changed", inputs=True),
    Column("image_sha256", _TEXT, "of that file", lambda r: r.input_digest("image_sha256")),
    Column("mask_sha256", _TEXT, "of that file", lambda r: r.input_digest("mask_sha256")),
    Column("tokens", _SIZE, "of the prompt that the model sees", lambda r: r.tokens),
    Column(
        "prompt_cut",
        pa.bool_(),
        "whether the prompt is longer than what the model sees",
        lambda r: r.embeddings.is_cut(r.sample.prompt),
        shard="prompt_cut",
        caption="prompt cut",
        added=True,
    ),
    Column("sha256", _TEXT, "of the image file", lambda r: r.image.sha256, shard="sha256"),
    Column("bytes", _INT, "of the image file", lambda r: r.image.size),
    Column(
        "status",
        _TEXT,
        "ok or failed",
        lambda r: OK if r.image.fault is None else FAILED,
        always=True,
    ),
    Column(
        "reason",
        _TEXT,
        "of a failed sample",
        lambda r: r.image.fault,
        always=True,
        caption="failed",
    ),
)
"""All columns, in the order of sidecars."""

SHARD_ORDER = (
    *("index", "id", "line", "prompt", "negative_prompt", "seed", "width", "height"),
    *("guidance_scale", "steps", "sampler", "sha256", "input_image", "input_mask", "strength"),
)
"""The order of columns in shards, which decides on their bytes; added ones follow."""


def columns_of(manifest: RunManifest) -> tuple[Column, ...]:
    """The columns of a data set."""
    return tuple(c for c in COLUMNS if not c.added or c.name in manifest.added_columns)


def shard_columns(manifest: RunManifest) -> tuple[Column, ...]:
    """The columns that are in the shards of a data set, in their order."""
    inputs = bool(set(manifest.prompts["tasks"]) - {"text"})
    columns = [c for c in columns_of(manifest) if c.shard and (inputs or not c.inputs)]
    place = {name: place for place, name in enumerate(SHARD_ORDER)}
    return tuple(sorted(columns, key=lambda column: place.get(column.shard, len(place))))


def row_of(result: Result, columns: Sequence[Column]) -> dict[str, Any]:
    """The sidecar's row of a sample."""
    bad = result.sample.fault is not None
    return {c.name: None if bad and not c.always else c.value(result) for c in columns}


def record_of(row: Mapping[str, Any], columns: Sequence[Column]) -> dict[str, Any]:
    """The part of a sidecar's row that is in the shard.

    Without nulls: readers that guess types from the first samples take a null for a type.
    """
    return {c.shard: _empty(c.type) if row[c.name] is None else row[c.name] for c in columns}


@dataclass(frozen=True)
class Sidecar:
    """The metadata of a shard.

    Attributes:
        rows: one per sample of the shard, by `index`.
        shard: its number.
        run: the manifest's fingerprint.
        size, sha256: of the shard.
        made_on: what decides on the last bits of the pixels: device, images per device, mesh.
    """

    rows: Sequence[Mapping[str, Any]]
    shard: int
    run: str
    size: int
    sha256: str
    made_on: Mapping[str, Any]


def write_sidecar(store: Store, name: str, sidecar: Sidecar, columns: Sequence[Column]) -> None:
    note = {key: value for key, value in vars(sidecar).items() if key != "rows"}
    schema = pa.schema([(column.name, column.type) for column in columns])
    schema = schema.with_metadata({_KEY: json.dumps(note, sort_keys=True)})
    table = pa.Table.from_pylist([dict(row) for row in sidecar.rows], schema)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    store.write(name, sink.getvalue().to_pybytes())


def read_sidecar(store: Store, name: str, columns: Sequence[str] | None = None) -> Sidecar:
    """A sidecar, or some of its columns.

    Raises:
        ValueError: it is damaged; FileNotFoundError where there is none.
    """
    with store.open(name) as file:
        try:
            table = pq.ParquetFile(file, page_checksum_verification=True)
            note = json.loads(table.schema_arrow.metadata[_KEY])
            rows = table.read(columns=None if columns is None else list(columns)).to_pylist()
            return Sidecar(rows=rows, **note)
        except (OSError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{store}/{name} is damaged ({reason})") from None


def finished_shards(store: Store, layout: ShardLayout) -> set[int]:
    """The shards that have a sidecar."""
    names = (name for name in store.names(METADATA) if name.endswith("parquet"))
    return {shard for name in names if (shard := layout.shard_of_file(name)) is not None}


def sidecar_fault(sidecar: Sidecar, manifest: RunManifest, shard: int) -> str | None:
    """Why a sidecar cannot be that of a shard; None if it can."""
    layout = manifest.layout
    name = layout.sidecar(shard)
    if sidecar.run != manifest.fingerprint:
        return f"{name} is of another data set"
    if sidecar.shard != shard:
        return f"{name} is that of shard {sidecar.shard}"
    if [row["index"] for row in sidecar.rows] != list(range(*layout.range(shard))):
        return f"{name} has not one row for each of its samples"
    return None


def _empty(type: pa.DataType) -> Any:
    if pa.types.is_string(type):
        return ""
    return False if pa.types.is_boolean(type) else 0.0 if pa.types.is_floating(type) else 0
