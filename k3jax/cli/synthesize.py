# SPDX-License-Identifier: Apache-2.0
"""Generate a data set of images from a file of prompts.

PROMPTS is a .txt (one prompt a line), .jsonl, .json, .csv, .tsv or .parquet file (or text with
.gz), several, or quoted patterns of them; - for standard input; hf:NAME:SPLIT for a data set of
Hugging Face; local or gs://, s3://, ...
Their columns are id, prompt, negative_prompt, seed, width, height, guidance_scale, and for rows
that start from an image: image, mask, strength. Only prompt is required. OUT is a folder or an
address, as gs://bucket/folder.

  k3jax synthesize prompts.jsonl pictures --checkpoint weights/kandinsky3
  k3jax synthesize prompts.parquet pictures --column prompt=caption --images-per-prompt 4
  k3jax synthesize 'prompts/*.txt' gs://bucket/pictures --format parquet --image-format webp

The same command resumes where it stopped; finished shards are checked and kept. Several processes
share the work, each with its own number from --job and --jobs, or from Kubernetes, SLURM, a TPU
slice or jax.distributed. An image does not depend on how the work is shared.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from k3jax.cli.environment import require
from k3jax.cli.flags import add_options
from k3jax.cli.generate import IMAGES
from k3jax.cli.inputs import NOTE, check_lora, open_checkpoint
from k3jax.pipelines.load_options import LoadOptions, LoraOptions
from k3jax.pipelines.options import TextToImageOptions
from k3jax.synthesis.options import SynthesizeConfig


FLAGS = {"num_images_per_prompt": "--images-per-prompt N"}
TEXTS = {"seed": "the seeds of the images are derived from it"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="PROMPTS", nargs="+", help="files of prompts; -; hf:NAME:SPLIT")
    add("output", metavar="OUT", help="folder or address of the data set")
    add("--checkpoint", metavar="DIR", help="a checkpoint written by `k3jax convert`")
    add_options(add, LoraOptions)
    add = parser.add_argument_group("the data set").add_argument
    add_options(add, SynthesizeConfig, prefix="synthesize.")
    add = parser.add_argument_group(IMAGES).add_argument
    add("--size", metavar="WxH", help="of prompts without a size, in multiples of 64")
    add_options(add, TextToImageOptions, without=("height", "width"), flags=FLAGS, texts=TEXTS)

    add = parser.add_argument_group("running").add_argument
    for name in ("job", "host"):
        add(f"--{name}", type=int, metavar="I", help=f"number of this {name}, from 0")
        add(f"--{name}s", type=int, metavar="N", help=f"how many {name}s share the work")
    add_options(add, LoadOptions)
    add("--metrics", metavar="DIR", help="folder of the JSON lines (OUT/metrics)")
    add("--prometheus", metavar="FILE", help="text file for a node exporter (OUT/metrics/*.prom)")


def run(args: argparse.Namespace) -> int:
    require("synth")

    from k3jax.synthesis.data_set import open_data_set, settings_of
    from k3jax.synthesis.metadata import finished_shards
    from k3jax.synthesis.shares import find_share

    share = find_share(os.environ, args.job, args.jobs, args.host, args.hosts)
    checkpoint, config = open_checkpoint(args)
    settings = settings_of(
        config.model, config.synthesize, config.generate, config.pipeline, args.size
    )
    load = LoadOptions.from_sources(config.pipeline)
    check_lora(config)

    from k3jax.synthesis.run import RunOptions, make_shards, samples_of
    from k3jax.synthesis.weights import Devices, Weights, loader, weights_fit_together

    devices = Devices.local(
        load.mesh, load.encoder_mesh, stream_text_encoder=load.stream_text_encoder
    )
    devices = devices.with_batch_size(load.batch_size)
    if config.checkpoint is None:
        print(NOTE, file=sys.stderr)
    weights = Weights(checkpoint, config.pipeline.lora, config.pipeline.lora_scale)
    options = config.synthesize
    opened = open_data_set(
        args.source, args.output, share, weights, options, settings, args.progress, devices
    )
    layout = opened.manifest.layout
    own = len(share.shards(layout.shards))
    print(
        f"k3jax: {layout.samples} images in {layout.shards} shards, {own} of them here "
        f"({share.reason}).",
        file=sys.stderr,
    )
    alternate = options.phases == "alternate" or (
        options.phases == "auto" and not weights_fit_together(checkpoint, settings, devices)
    )
    code, state = make_shards(
        opened.store,
        opened.manifest,
        samples_of(opened.index, opened.rules, opened.manifest),
        loader(weights, settings, devices),
        devices.batch_size,
        RunOptions(
            share,
            options.check,
            options.shards_per_phase if alternate else None,
            options.grace_seconds,
            args.metrics,
            args.prometheus,
            args.progress,
            opened.manifest.found_at["images"],
        ),
    )
    count, failed = state["k3jax_images_total"], state["k3jax_failed_samples_total"]
    missing = set(range(layout.shards)) - finished_shards(opened.store, layout)
    end, rest = ending(code, share, sorted(missing), layout.shards)
    print(
        f"k3jax: {end}: {count} images generated at "
        f"{state['k3jax_images_per_second']:.3g} a second"
        f"{f', {failed} samples failed (their reasons: k3jax verify)' if failed else ''}{rest}.",
        file=sys.stderr,
    )
    return code


def ending(code: int, share, missing: Sequence[int], shards: int) -> tuple[str, str]:
    """How a run ended, and what is missing of the data set.

    Args:
        share: the k3jax.synthesis.shares.Share of this process.
        missing: the shards that do not exist.
    """
    if code != 0:
        return "stopped", ""
    if not missing:
        return "finished", ""
    others = sorted({shard % share.workers for shard in missing})
    named = ", ".join(map(str, others[:8])) + (", ..." if len(others) > 8 else "")
    return (
        f"share {share.worker} of {share.workers} is finished",
        f"; the data set is not whole: {len(missing)} of its {shards} shards are missing, of the "
        f"shares {named}",
    )
