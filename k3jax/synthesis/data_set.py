# SPDX-License-Identifier: Apache-2.0
"""A data set that is begun or continued: its settings and prompts, checked before long work."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from k3jax.config import ModelConfig
from k3jax.pipelines import call_inputs
from k3jax.pipelines.call_inputs import CallInputs
from k3jax.pipelines.memory import check_memory
from k3jax.pipelines.options import TextToImageOptions
from k3jax.sampling.samplers import steps_of_strength
from k3jax.synthesis.image_formats import QUALITY, ImageFormat
from k3jax.synthesis.metadata import COLUMNS
from k3jax.synthesis.options import SynthesizeConfig
from k3jax.synthesis.prompt_files import FORMATS
from k3jax.synthesis.prompt_index import INDEX, PromptIndex, PromptSource, Summary, spool
from k3jax.synthesis.run_manifest import (
    CALL_OPTIONS,
    MANIFEST,
    RunManifest,
    Settings,
    parse_size,
    prompts_entry,
    versions,
    write_or_compare,
)
from k3jax.synthesis.samples import RowRules
from k3jax.synthesis.shares import Share
from k3jax.synthesis.store import LOCK_FILE, Store, is_remote, store_at
from k3jax.synthesis.weights import Devices, Weights


STDIN = "-"
INSIDE = "./"
"""Begins the path of prompts that the data set itself holds."""


@dataclass(frozen=True)
class DataSet:
    """A data set whose manifest is stored, and the checked rows of its prompts."""

    store: Store
    manifest: RunManifest
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
    call = TextToImageOptions.from_sources(generate, prompt="")
    height, width = call.size(model)
    if size is not None:
        width, height = parse_size(size)
    for w, h in ((width, height), *map(parse_size, options.buckets)):
        call_inputs.check_size(model, h, w)
    sampler = CallInputs(call, model, [(width, height)]).sampler
    if options.lossless and options.quality is not None:
        raise ValueError("--quality and --lossless exclude each other: give one of them.")
    quality = QUALITY[options.image_format] if options.quality is None else options.quality
    encoding = ImageFormat(options.image_format, None if options.lossless else quality)
    if options.strength is not None:
        steps_of_strength(options.strength, sampler.num_steps)
    columns = _columns(options.columns)
    return Settings(
        format=options.format,
        image_format=encoding.name,
        quality=encoding.quality,
        samples_per_shard=options.samples_per_shard,
        images_per_prompt=call.num_images_per_prompt,
        seed=call.seed,
        width=width,
        height=height,
        buckets=tuple(options.buckets),
        negative_prompt=call.negative_prompt,
        sampler=call.sampler_config(model),
        conditioning=model.conditioning,
        dtype=pipeline.dtype,
        param_dtype=pipeline.param_dtype or pipeline.dtype,
        columns=tuple(f"{name}={theirs}" for name, theirs in sorted(columns.items())),
        skip_bad=options.skip_bad,
        strength=options.strength,
        int8_text_encoder=pipeline.int8_text_encoder,
        **{name: getattr(call, name) for name, *_ in CALL_OPTIONS},
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
    """Reads all prompts, and writes the manifest, or compares it with the stored one.

    Args:
        devices: those of this host, to check their memory; None: not checked.

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
    index = source.index(store, progress)
    _check_prompts(index.summary, settings, options.max_sizes)
    if devices is not None:
        # Rows may do without guidance.
        sizes = [(w, h) for w, h, _ in index.summary.sizes]
        size = devices.batch_size
        check_memory(
            weights.checkpoint.config, devices.mesh, size, settings.dtype, sizes, guided=False
        )
    if index.summary.unused:
        names = ", ".join(index.summary.unused[:10])
        print(f"k3jax: note: columns that are not used: {names}.", file=sys.stderr)
    manifest = RunManifest(
        weights=weights.identity,
        prompts=prompts_entry(index.summary),
        settings=settings,
        versions=versions(),
        found_at={
            **weights.places,
            "prompts": found_at,
            "prompts_format": kind,
            "images": options.image_folder or image_folder(found_at[0]),
        },
        added_columns=tuple(column.name for column in COLUMNS if column.added),
    )
    store.prepare()
    manifest = write_or_compare(store, manifest)
    index.save(store)
    return DataSet(store, manifest, index, rules)


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
    known = {MANIFEST, INDEX, LOCK_FILE, *(f"prompts.{kind}" for kind in FORMATS)}
    if MANIFEST not in names and names - known:
        raise ValueError(
            f"{store} holds {sorted(names - known)[0]} and no data set: take an empty folder."
        )


def _check_prompts(summary: Summary, settings: Settings, max_sizes: int) -> None:
    if not any(file["rows"] for file in summary.files):
        names = ", ".join(file["name"] for file in summary.files)
        raise ValueError(f"{names} holds no prompts.")
    if summary.faults and not settings.skip_bad:
        more = summary.faults - len(summary.examples)
        raise ValueError(
            f"{'; '.join(summary.examples)}{f'; and {more} more bad lines' if more else ''}. "
            "Correct them, or let them be failed samples with --skip-bad."
        )
    if len(summary.sizes) > max_sizes:
        raise ValueError(
            f"the prompts have {len(summary.sizes)} sizes, each of them a program to compile: give "
            "a few with --buckets, such as --buckets 1024x1024,896x1152,1152x896, or raise "
            f"--max-sizes {max_sizes}."
        )
