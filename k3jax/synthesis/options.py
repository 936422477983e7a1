# SPDX-License-Identifier: Apache-2.0
"""The options of a data set: `synthesize.*` in a config file, flags of `k3jax synthesize`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SynthesizeConfig:
    """How a data set is written and computed; the options of its images are those of `generate`."""

    format: Literal["webdataset", "parquet", "files"] = "webdataset"
    image_format: Literal["jpeg", "png", "webp"] = "jpeg"
    quality: int | None = None
    lossless: bool = False
    samples_per_shard: int = 1000
    buckets: tuple[str, ...] = ()
    max_sizes: int = 16
    columns: tuple[str, ...] = ()
    """NAME=THEIRS each."""
    prompts_format: Literal["txt", "jsonl", "csv", "parquet"] | None = None
    skip_bad: bool = False
    strength: float | None = None
    image_folder: str | None = None
    check: Literal["sha256", "size", "none"] = "sha256"
    phases: Literal["auto", "together", "alternate"] = "auto"
    shards_per_phase: int = 4
    grace_seconds: float = 30.0
