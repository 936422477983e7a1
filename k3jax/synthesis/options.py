# SPDX-License-Identifier: Apache-2.0
"""The options of a data set: `synthesize.*` in a config file, flags of `k3jax synthesize`."""

import functools
from dataclasses import dataclass
from typing import Any, Literal

from k3jax.arguments import check_number, check_text, shown, whole_number
from k3jax.pipelines.option_fields import Options, option


check_count = functools.partial(whole_number, least=1)


def check_seconds(value: Any, name: str) -> float:
    seconds = check_number(value, name)
    if seconds <= 0:
        raise ValueError(f"{name} is {shown(value)}; it must be more than 0.")
    return seconds


def check_texts(value: Any, name: str) -> tuple[str, ...]:
    return tuple(check_text(one, name) for one in value)


@dataclass(frozen=True, kw_only=True, eq=False)
class SynthesizeConfig(Options):
    """How a data set is written and computed; the options of its images are those of `generate`."""

    format: Literal["webdataset", "parquet", "files"] = option(
        "webdataset", "format of the shards", flag="--format"
    )
    image_format: Literal["jpeg", "png", "webp"] = option(
        "jpeg", "format of the images", flag="--image-format"
    )
    quality: int | None = option(None, "1 to 100 (jpeg 95, webp 90)", whole_number, "--quality N")
    lossless: bool = option(False, "lossless webp; png always is", flag="--lossless")
    samples_per_shard: int = option(1000, "images in a shard", check_count, "--samples-per-shard N")
    columns: tuple[str, ...] = option(
        (), "a column's name in the files", check_texts, "--column NAME=THEIRS", repeated=True
    )
    prompts_format: Literal["txt", "jsonl", "json", "csv", "tsv", "parquet"] | None = option(
        None, "format of the prompts (by the file's ending)", flag="--prompts-format"
    )
    skip_bad: bool = option(False, "bad lines become failed samples", flag="--skip-bad")
    buckets: tuple[str, ...] = option(
        (), "give every prompt the nearest of these sizes", check_texts, "--buckets WxH,WxH"
    )
    max_sizes: int = option(
        16, "most sizes; each is a program to compile", check_count, "--max-sizes N"
    )
    strength: float | None = option(
        None, "how much input images change (0.3; with a mask 1)", check_number, "--strength X"
    )
    image_folder: str | None = option(
        None, "folder of the input images (that of the prompts)", check_text, "--images-from DIR"
    )
    check: Literal["sha256", "size", "none"] = option(
        "sha256", "check of finished shards", flag="--check"
    )
    phases: Literal["auto", "together", "alternate"] = option(
        "auto", "text encoder and U-Net in memory together, or in turn", flag="--phases"
    )
    shards_per_phase: int = option(
        4, "shards in a phase, where they alternate", check_count, "--shards-per-phase N"
    )
    grace_seconds: float = option(
        30.0, "seconds from SIGTERM to the end", check_seconds, "--grace S"
    )
