# SPDX-License-Identifier: Apache-2.0
"""Names and arithmetic of a data set's files.

manifest.json              what the data set is a function of
prompts-index.parquet      the checked rows of the prompt files
data/000012.tar            shard 12 (.tar, .parquet, or a folder)
metadata/000012.parquet    its sidecar, written last: with it the shard is finished
metrics/                   how the work goes; nothing in it belongs to the data
"""

from dataclasses import dataclass
from typing import Literal


Format = Literal["webdataset", "parquet", "files"]

MANIFEST = "manifest.json"
CARD = "README.md"
DATA, METADATA, METRICS = "data", "metadata", "metrics"
ENDINGS = {"webdataset": ".tar", "parquet": ".parquet", "files": ""}


@dataclass(frozen=True)
class Layout:
    samples: int
    samples_per_shard: int
    format: Format

    @property
    def shards(self) -> int:
        return -(-self.samples // self.samples_per_shard)

    def range(self, shard: int) -> tuple[int, int]:
        """First sample of a shard, and the one behind its last."""
        first = shard * self.samples_per_shard
        return first, min(first + self.samples_per_shard, self.samples)

    def shard_of(self, sample: int) -> int:
        return sample // self.samples_per_shard

    def name(self, shard: int) -> str:
        return f"{shard:0{max(6, len(str(self.shards - 1)))}d}"

    def data(self, shard: int) -> str:
        return f"{DATA}/{self.name(shard)}{ENDINGS[self.format]}"

    def sidecar(self, shard: int) -> str:
        return f"{METADATA}/{self.name(shard)}.parquet"

    def shard_named(self, file: str) -> int | None:
        """The shard that a file in data/ or metadata/ is of; None for another file."""
        stem = file.split(".")[0]
        if not stem.isdigit():
            return None
        shard = int(stem)
        names = (self.data(shard).split("/")[1], self.sidecar(shard).split("/")[1])
        return shard if shard < self.shards and file in names else None
