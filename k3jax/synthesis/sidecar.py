# SPDX-License-Identifier: Apache-2.0
"""The Parquet sidecar of a shard: what was asked for, what came of it, and the shard's checksum.

It is written after the shard. Its presence is what makes a shard finished, so the two need not
appear at the same moment.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from k3jax.synthesis.store import Store


OK, FAILED = "ok", "failed"
_KEY = b"k3jax"


@dataclass(frozen=True)
class Sidecar:
    """
    Attributes:
        rows: one per sample of the shard, by `index`; the columns of `sidecar_schema`.
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


def sidecar_schema():
    import pyarrow as pa

    return pa.schema(
        [
            ("index", pa.int64()),
            ("id", pa.string()),
            ("key", pa.string()),
            ("line", pa.int64()),
            ("prompt", pa.string()),
            ("negative_prompt", pa.string()),
            ("seed", pa.int64()),
            ("steps", pa.int32()),
            ("guidance_scale", pa.float64()),
            ("sampler", pa.string()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("image", pa.string()),
            ("mask", pa.string()),
            ("strength", pa.float64()),
            ("image_sha256", pa.string()),
            ("mask_sha256", pa.string()),
            ("tokens", pa.int32()),
            ("sha256", pa.string()),
            ("bytes", pa.int64()),
            ("status", pa.string()),
            ("reason", pa.string()),
        ]
    )


def write_sidecar(store: Store, name: str, sidecar: Sidecar) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    note = {
        "shard": sidecar.shard,
        "run": sidecar.run,
        "size": sidecar.size,
        "sha256": sidecar.sha256,
        "made_on": dict(sidecar.made_on),
    }
    schema = sidecar_schema().with_metadata({_KEY: json.dumps(note, sort_keys=True)})
    table = pa.Table.from_pylist([dict(row) for row in sidecar.rows], schema)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    store.write(name, sink.getvalue().to_pybytes())


def read_sidecar(store: Store, name: str, columns: Sequence[str] | None = None) -> Sidecar:
    """A sidecar, or some of its columns.

    Raises:
        ValueError: it is damaged; FileNotFoundError where there is none.
    """
    import pyarrow.parquet as pq

    with store.open(name) as file:
        try:
            table = pq.ParquetFile(file, page_checksum_verification=True)
            note = json.loads(table.schema_arrow.metadata[_KEY])
            rows = table.read(columns=None if columns is None else list(columns)).to_pylist()
            return Sidecar(rows=rows, **note)
        except (OSError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{store}/{name} is damaged ({reason})") from None
