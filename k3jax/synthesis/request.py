# SPDX-License-Identifier: Apache-2.0
"""What a run is asked for, checked in full before anything is made."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from k3jax.arguments import check_number
from k3jax.config import ModelConfig
from k3jax.model.tokenizer import check_prompt
from k3jax.pipelines import call_inputs
from k3jax.pipelines.memory import check_memory
from k3jax.pipelines.options import TextToImageOptions
from k3jax.sampling.denoise import loop_rows, sample_keys
from k3jax.sampling.samplers import steps_of_strength
from k3jax.synthesis.encoding import QUALITY, ImageFormat
from k3jax.synthesis.files import is_remote
from k3jax.synthesis.layout import INDEX, MANIFEST
from k3jax.synthesis.loading import Devices, Weights
from k3jax.synthesis.locks import LOCK_FILE
from k3jax.synthesis.options import SynthesizeConfig
from k3jax.synthesis.prompt_source import PromptIndex, PromptSource, spool
from k3jax.synthesis.run import indexed, keep_index
from k3jax.synthesis.run_manifest import (
    Manifest,
    Settings,
    parse_size,
    prompts_entry,
    versions,
    write_or_compare,
)
from k3jax.synthesis.samples import RowRules
from k3jax.synthesis.shares import Share
from k3jax.synthesis.storage import Store, store_at


STDIN = "-"
INSIDE = "./"
"""Begins the path of prompts that the data set itself holds."""


@dataclass(frozen=True)
class DataSet:
    store: Store
    manifest: Manifest
    source: PromptSource
    index: PromptIndex
    rules: RowRules


def settings_of(
    model: ModelConfig, options: SynthesizeConfig, generate, pipeline, size: str | None = None
) -> Settings:
    """The settings of a data set.

    Args:
        generate: the options of its images.
        pipeline: how the model runs.
        size: WIDTHxHEIGHT; None: that of `generate`.

    Raises:
        ValueError: one of them is wrong.
    """
    wanted, made = options, generate
    width, height = (made.width, made.height) if size is None else parse_size(size)
    width, height = width or model.sample_size, height or model.sample_size
    for w, h in ((width, height), *map(parse_size, wanted.buckets)):
        call_inputs.check_size(model, h, w)
    options = TextToImageOptions.from_sources(made)
    sampler, loop = call_inputs.checked_sampler(options.sampler_config(model))
    loop_rows(loop, made.guidance_interval)
    call_inputs.guidance_scales(sampler.guidance_scale, 1)
    sample_keys([made.seed])
    if made.negative_prompt is not None:
        check_prompt(made.negative_prompt, 0)
    for name, value in (
        ("--samples-per-shard", wanted.samples_per_shard),
        ("--images-per-prompt", made.num_images_per_prompt),
        ("--max-sizes", wanted.max_sizes),
        ("--shards-per-phase", wanted.shards_per_phase),
        ("--grace", wanted.grace_seconds),
    ):
        if check_number(value, name) <= 0:
            raise ValueError(f"{name} is {value}; it must be more than 0.")
    if wanted.lossless and wanted.quality is not None:
        raise ValueError("--quality and --lossless exclude each other: give one of them.")
    quality = QUALITY[wanted.image_format] if wanted.quality is None else wanted.quality
    encoding = ImageFormat(wanted.image_format, None if wanted.lossless else quality)
    if wanted.strength is not None:
        steps_of_strength(wanted.strength, loop.num_steps)
    columns = _columns(wanted.columns)
    return Settings(
        format=wanted.format,
        image_format=encoding.name,
        quality=encoding.quality,
        samples_per_shard=wanted.samples_per_shard,
        images_per_prompt=made.num_images_per_prompt,
        seed=made.seed,
        width=width,
        height=height,
        buckets=tuple(wanted.buckets),
        negative_prompt=made.negative_prompt,
        sampler=sampler,
        guidance_interval=made.guidance_interval,
        conditioning=model.conditioning,
        dtype=pipeline.dtype,
        param_dtype=pipeline.param_dtype or pipeline.dtype,
        columns=tuple(f"{name}={theirs}" for name, theirs in sorted(columns.items())),
        skip_bad=wanted.skip_bad,
        strength=wanted.strength,
        int8_text_encoder=pipeline.int8_text_encoder,
    )


def open_source(
    paths: Sequence[str], settings: Settings, rules: RowRules, kind: str | None
) -> PromptSource:
    return PromptSource(paths, rules, kind, _columns(settings.columns))


def open_data_set(
    paths: Sequence[str],
    output: str,
    share: Share,
    weights: Weights,
    options: SynthesizeConfig,
    settings: Settings,
    progress: bool = False,
    devices: Devices | None = None,
) -> DataSet:
    """Reads all prompts, and records the data set in its folder or finds it recorded there.

    Args:
        devices: what will make it; None: not here, and not checked.

    Raises:
        ValueError: bad prompts, a folder that cannot be written, or one of another data set; images
            that cannot fit in the devices' memory.
    """
    store, kind = store_at(output), options.prompts_format
    _check_folder(store)
    found_at = [str(Path(p).absolute()) if _is_local(p) else p for p in paths]
    if STDIN in paths:
        if len(paths) > 1 or share.workers > 1:
            raise ValueError(
                "standard input can be read once, by one process: write it to a file first."
            )
        kind = kind or "txt"
        if kind == "parquet":
            raise ValueError("standard input cannot be Parquet: write it to a file first.")
        store.prepare()
        name = spool(sys.stdin.buffer, store, kind)
        paths, found_at = [f"{store}/{name}"], [INSIDE + name]
    rules = settings.row_rules(weights.checkpoint.config)
    source = open_source(paths, settings, rules, kind)
    index = indexed(store, source, rules, progress)
    _check_prompts(index, settings, options.max_sizes)
    if devices is not None:
        # Rows may do without guidance.
        sizes = list(index.sizes)
        size = devices.batch_size
        check_memory(
            weights.checkpoint.config, devices.mesh, size, settings.dtype, sizes, guided=False
        )
    if index.unused:
        names = ", ".join(index.unused[:10])
        print(f"k3jax: note: columns that are not used: {names}.", file=sys.stderr)
    manifest = Manifest(
        weights=weights.identity,
        prompts=prompts_entry(index),
        settings=settings,
        versions=versions(),
        found_at={
            **weights.places,
            "prompts": found_at,
            "prompts_format": kind,
            "images": options.image_folder or image_folder(found_at[0]),
        },
    )
    store.prepare()
    write_or_compare(store, manifest)
    keep_index(store, source, rules, index)
    return DataSet(store, manifest, source, index, rules)


def image_folder(prompts: str) -> str:
    """Where relative paths of images start: the folder of the prompts."""
    if (not _is_local(prompts) and not is_remote(prompts)) or prompts.startswith(INSIDE):
        return str(Path.cwd())
    return prompts.rpartition("/")[0] or "/"


def _is_local(path: str) -> bool:
    return not is_remote(path) and not path.startswith("hf:")


def _columns(texts: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, theirs = text.partition("=")
        if not equals:
            raise ValueError(f"--column {text!r} is not NAME=THEIRS, such as prompt=caption.")
        pairs[name.strip()] = theirs.strip()
    return pairs


def _check_folder(store: Store) -> None:
    """Refuses a folder with something else in it."""
    names = {name for name in store.names("") if not name.startswith(".")}
    known = {MANIFEST, INDEX, LOCK_FILE, "prompts.txt", "prompts.jsonl", "prompts.csv"}
    if MANIFEST not in names and names - known:
        raise ValueError(
            f"{store} holds {sorted(names - known)[0]} and no data set: take an empty folder."
        )


def _check_prompts(index: PromptIndex, settings: Settings, max_sizes: int) -> None:
    if not index.rows:
        names = ", ".join(file.name for file in index.files)
        raise ValueError(f"{names} holds no prompts.")
    if index.faults and not settings.skip_bad:
        more = index.faults - len(index.examples)
        raise ValueError(
            f"{'; '.join(index.examples)}{f'; and {more} more bad lines' if more else ''}. Mend "
            "them, or let them be failed samples with --skip-bad."
        )
    if len(index.sizes) > max_sizes:
        raise ValueError(
            f"the prompts have {len(index.sizes)} sizes, each of them a program to compile: give "
            "a few with --buckets, such as --buckets 1024x1024,896x1152,1152x896, or raise "
            f"--max-sizes {max_sizes}."
        )
