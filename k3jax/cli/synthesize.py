# SPDX-License-Identifier: Apache-2.0
"""Make a data set of images from a file of prompts.

PROMPTS is a .txt (a prompt a line), .jsonl, .csv or .parquet file, several, or quoted patterns of
them; - for standard input; hf:NAME:SPLIT for a data set of Hugging Face; local or gs://, s3://, ...
Their columns are id, prompt, negative_prompt, seed, width, height, guidance_scale, and for rows
that start from an image: image, mask, strength. Only prompt is needed. OUT is a folder or an
address, as gs://bucket/folder.

  k3jax synthesize prompts.jsonl pictures --checkpoint weights/kandinsky3
  k3jax synthesize prompts.parquet pictures --column prompt=caption --images-per-prompt 4
  k3jax synthesize 'prompts/*.txt' gs://bucket/pictures --format parquet --image-format webp

The same command goes on where it stopped: finished shards are checked and kept. Many processes
share the work, each with its own number from --job and --jobs, or from Kubernetes, SLURM, a TPU
slice or jax.distributed. Every image is the same however the work is shared.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from k3jax.cli.extras import require
from k3jax.cli.generate import (
    NOTE,
    add_dtypes,
    add_sampler,
    add_streaming,
    asked_checkpoint,
    check_architecture,
    check_lora,
)
from k3jax.cli.run_config import build, collect


SETTINGS = {
    "checkpoint": "checkpoint",
    "images_per_prompt": "generate.num_images_per_prompt",
    "seed": "generate.seed",
    "negative_prompt": "generate.negative_prompt",
    "steps": "generate.num_inference_steps",
    "guidance_scale": "generate.guidance_scale",
    "guidance_interval": "generate.guidance_interval",
    "sampler": "generate.sampler",
    "eta": "generate.eta",
    "format": "synthesize.format",
    "image_format": "synthesize.image_format",
    "quality": "synthesize.quality",
    "lossless": "synthesize.lossless",
    "samples_per_shard": "synthesize.samples_per_shard",
    "buckets": "synthesize.buckets",
    "max_sizes": "synthesize.max_sizes",
    "column": "synthesize.columns",
    "prompts_format": "synthesize.prompts_format",
    "skip_bad": "synthesize.skip_bad",
    "strength": "synthesize.strength",
    "images_from": "synthesize.image_folder",
    "check": "synthesize.check",
    "phases": "synthesize.phases",
    "shards_per_phase": "synthesize.shards_per_phase",
    "grace": "synthesize.grace_seconds",
    "mesh": "pipeline.mesh",
    "encoder_mesh": "pipeline.encoder_mesh",
    "dtype": "pipeline.dtype",
    "param_dtype": "pipeline.param_dtype",
    "int8_text_encoder": "pipeline.int8_text_encoder",
    "stream_text_encoder": "pipeline.stream_text_encoder",
    "lora": "pipeline.lora",
    "lora_scale": "pipeline.lora_scale",
    "batch_size": "pipeline.batch_size",
}
"""Flag -> key of RunConfig."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="PROMPTS", nargs="+", help="files of prompts; -; hf:NAME:SPLIT")
    add("output", metavar="OUT", help="folder or address of the data set")
    add("--checkpoint", metavar="DIR", help="a checkpoint made by `k3jax convert`")
    add("--lora", metavar="DIR", help="a LoRA trained on that checkpoint")
    add("--lora-scale", type=float, metavar="X", help="its strength (1)")

    add = parser.add_argument_group("the data set").add_argument
    add("--format", choices=("webdataset", "parquet", "files"), help="of the shards (webdataset)")
    add("--image-format", choices=("jpeg", "png", "webp"), help="(jpeg)")
    add("--quality", type=int, metavar="N", help="1 to 100 (jpeg 95, webp 90)")
    add("--lossless", action="store_true", default=None, help="of webp; png always is")
    add("--samples-per-shard", type=int, metavar="N", help="images in a shard (1000)")
    add("--images-per-prompt", type=int, metavar="N", help="(1)")
    add("--seed", type=int, metavar="N", help="from which those of the samples are made (0)")

    add = parser.add_argument_group("prompts").add_argument
    add("--column", action="append", metavar="NAME=THEIRS", help="a column's name in the files")
    add("--prompts-format", choices=("txt", "jsonl", "csv", "parquet"), help="(by the ending)")
    add("--skip-bad", action="store_true", default=None, help="bad lines become failed samples")

    add = parser.add_argument_group("images (by default as the checkpoint says)").add_argument
    add("--size", metavar="WxH", help="of prompts that name none, in multiples of 64")
    add("--buckets", metavar="WxH,WxH", help="make every prompt in the nearest of these sizes")
    add("--max-sizes", type=int, metavar="N", help="each size is a program to compile (16)")
    add("--negative-prompt", metavar="TEXT", help="of prompts that name none")
    add_sampler(add, guidance_scale="of prompts that name none")
    add("--eta", type=float, metavar="X", help="share of new noise in each step, 0 to 1")

    add("--strength", type=float, metavar="X", help="how much input images change (0.3; masked 1)")
    add("--images-from", metavar="DIR", help="where input images are (the folder of the prompts)")

    add = parser.add_argument_group("running").add_argument
    for name in ("job", "host"):
        add(f"--{name}", type=int, metavar="I", help=f"number of this {name}, from 0")
        add(f"--{name}s", type=int, metavar="N", help=f"how many {name}s share the work")
    add("--mesh", help="this host's devices, such as data=-1 (the default) or data=2,tensor=4")
    add("--encoder-mesh", metavar="MESH", help="for the text encoder (as --mesh)")
    add("--batch-size", type=int, metavar="N", help="images at a time (one per device)")
    add_dtypes(add)
    add_streaming(add)
    add("--check", choices=("sha256", "size", "none"), help="of finished shards (sha256)")
    add("--phases", choices=("auto", "together", "alternate"), help="encode and denoise (auto)")
    add("--shards-per-phase", type=int, metavar="N", help="where they alternate (4)")
    add("--grace", type=float, metavar="S", help="seconds from SIGTERM to the end (30)")
    add("--metrics", metavar="DIR", help="folder of the JSON lines (OUT/metrics)")
    add("--prometheus", metavar="FILE", help="text file for a node exporter (OUT/metrics/*.prom)")


def run(args: argparse.Namespace) -> int:
    require("synth")
    settings = {key: getattr(args, flag) for flag, key in SETTINGS.items()}
    if args.buckets is not None:
        settings["synthesize.buckets"] = tuple(filter(None, args.buckets.split(",")))
    if args.column is not None:
        settings["synthesize.columns"] = tuple(args.column)
    values = collect(args.config, args.overrides, settings)

    from k3jax.pipelines.load_options import LoadOptions
    from k3jax.synthesis.checking import finished_shards
    from k3jax.synthesis.request import open_data_set, settings_of
    from k3jax.synthesis.shares import find_share

    share = find_share(os.environ, args.job, args.jobs, args.host, args.hosts)
    checkpoint = asked_checkpoint(values, named_by_config=args.checkpoint is None)
    config = build(values, checkpoint.config)
    if values.get("model"):
        check_architecture(checkpoint, config)
    wanted = settings_of(
        config.model, config.synthesize, config.generate, config.pipeline, args.size
    )
    LoadOptions.from_sources(config.pipeline)

    from k3jax.synthesis.loading import Devices, Weights, loader, weights_fit_together
    from k3jax.synthesis.run import Running, make_shards, samples_of

    devices = Devices.local(
        config.pipeline.mesh,
        config.pipeline.encoder_mesh,
        stream_text_encoder=config.pipeline.stream_text_encoder,
    )
    devices = devices.with_batch_size(config.pipeline.batch_size)
    if config.checkpoint is None:
        print(NOTE, file=sys.stderr)
    weights = Weights(checkpoint, config.pipeline.lora, config.pipeline.lora_scale)
    check_lora(config)
    opened = open_data_set(
        args.source, args.output, share, weights, config, wanted, args.progress, devices
    )
    layout = opened.manifest.layout
    mine = len(share.shards(layout.shards))
    print(
        f"k3jax: {layout.samples} images in {layout.shards} shards, {mine} of them here "
        f"({share.reason}).",
        file=sys.stderr,
    )
    alternate = config.synthesize.phases == "alternate" or (
        config.synthesize.phases == "auto" and not weights_fit_together(checkpoint, wanted, devices)
    )
    code, state = make_shards(
        opened.store,
        opened.manifest,
        samples_of(opened.source, opened.index, opened.rules, opened.manifest),
        loader(weights, wanted, devices),
        devices.batch_size,
        Running(
            share,
            config.synthesize.check,
            config.synthesize.shards_per_phase if alternate else None,
            config.synthesize.grace_seconds,
            args.metrics,
            args.prometheus,
            args.progress,
            opened.manifest.found_at["images"],
        ),
    )
    made, failed = state["k3jax_images_total"], state["k3jax_failed_samples_total"]
    missing = set(range(layout.shards)) - finished_shards(opened.store, layout)
    end, rest = ending(code, share, sorted(missing), layout.shards)
    print(
        f"k3jax: {end}: {made} images made at "
        f"{state['k3jax_images_per_second']:.3g} a second"
        f"{f', {failed} samples failed (their reasons: k3jax verify)' if failed else ''}{rest}.",
        file=sys.stderr,
    )
    return code


def ending(code: int, share, missing: Sequence[int], shards: int) -> tuple[str, str]:
    """How a run ended, and what of the data set is still to be made.

    Args:
        share: k3jax.synthesis.shares.Share of this process.
        missing: shards that are not there.
    """
    if code != 0:
        return "stopped", ""
    if not missing:
        return "finished", ""
    theirs = sorted({shard % share.workers for shard in missing})
    named = ", ".join(map(str, theirs[:8])) + (", ..." if len(theirs) > 8 else "")
    return (
        f"share {share.worker} of {share.workers} is finished",
        f"; the data set is not whole: {len(missing)} of its {shards} shards are missing, of the "
        f"shares {named}",
    )
