# SPDX-License-Identifier: Apache-2.0
"""Estimate memory, time and cost on a TPU slice, without a TPU.

  k3jax plan --topology v5e:2x4 --batch 8 --price-per-chip-hour 1.2
  k3jax plan --topology v6e:1x1 --config flash --json

Compiles the text encoder, one denoising step and the decoder for the slice, without weights, with
the real TPU compiler (pip install 'k3jax[tpu]'; Linux). The full-size model takes 5 to 15 minutes a
program. A batch that does not fit is refused, with the largest one that does. Without --config or
--checkpoint the model is Kandinsky 3 (`kandinsky3`).
"""

import argparse
import json
import os
import sys
from pathlib import Path

from k3jax.cli.flags import AddArgument, add_options, flag_values
from k3jax.cli.inputs import open_checkpoint
from k3jax.cli.run_config import RunConfig, build, collect
from k3jax.pipelines.load_options import LoadOptions
from k3jax.pipelines.options import TextToImageOptions


DEFAULT_CONFIG = "kandinsky3"
NO_EFFECT = ("negative_prompt", "num_images_per_prompt", "seed", "eta")  # on a plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--topology", metavar="CHIP:SHAPE", help="a slice, such as v5e:2x4 or v5p:2x2x1")
    add_work(add)
    add("--price-per-chip-hour", type=float, metavar="DOLLARS", help="for dollars per 1,000 images")
    add("--json", action="store_true", help="print one JSON object")


def add_work(add: AddArgument) -> None:
    """The batch and the programs that are compiled."""
    add(
        "--batch",
        type=int,
        default=1,
        metavar="N",
        help="images on each chip at a time (1); all chips: N times data x fsdp of the mesh",
    )
    add("--checkpoint", metavar="DIR", help="its architecture and sampler")
    add_options(add, TextToImageOptions, without=NO_EFFECT)
    add("--programs", metavar="LIST", help="some of encode,denoise,decode (all)")
    add_options(add, LoadOptions, without=("batch_size", "stream_text_encoder"))


def run(args: argparse.Namespace) -> None:
    if args.topology is None:
        raise ValueError("give a slice with --topology, such as --topology v5e:2x4.")
    if args.price_per_chip_hour is not None and not args.price_per_chip_hour >= 0:
        raise ValueError(
            f"--price-per-chip-hour is {args.price_per_chip_hour}; it must be 0 or more."
        )

    from k3jax.planning.chips import parse_slice

    where = parse_slice(args.topology)
    config = run_config(args, DEFAULT_CONFIG)
    # Nothing runs here. Looking for an accelerator that is not there may take minutes.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    from k3jax.planning.compiler import check_libtpu, compile_in_child
    from k3jax.planning.plan import make_plan
    from k3jax.planning.report import to_json, to_lines

    options = _plan_options(args, where, config)
    check_libtpu()

    def say(text: str) -> None:
        if not args.no_progress:
            print(f"k3jax: {text}", file=sys.stderr, flush=True)

    plan = make_plan(
        options, lambda program, work: compile_in_child(program, work, where, say), say
    )
    print(json.dumps(to_json(plan)) if args.json else "\n".join(to_lines(plan)))


def run_config(args: argparse.Namespace, default: str) -> RunConfig:
    """The settings, with the model of the checkpoint, of the config, or of the config `default`."""
    if args.config is None and args.checkpoint is None:
        args.config = default
    values = collect(args.config, args.overrides, flag_values(args))
    # A config may name a checkpoint that does not exist yet: people plan before they convert.
    path, has_model = values.get("checkpoint"), bool(values.get("model"))
    if args.checkpoint is not None or (path and not has_model and Path(path).exists()):
        return open_checkpoint(args)[1]
    # The config of a machine or of a training has no model.
    return build(values, None if has_model else build(collect(default)).model)


def _plan_options(args: argparse.Namespace, where, config: RunConfig):
    from k3jax.planning.workload import PlanOptions

    size_and_sampler(config)  # checks them
    return PlanOptions(
        where=where,
        model=config.model,
        call=TextToImageOptions.from_sources(config.generate),
        load=LoadOptions.from_sources(config.pipeline),
        batch=args.batch,
        parts=parts(args),
        price=args.price_per_chip_hour,
    )


def parts(args: argparse.Namespace) -> tuple[str, ...]:
    """The names in --programs."""
    from k3jax.planning.workload import PARTS

    return PARTS if args.programs is None else tuple(args.programs.replace(" ", "").split(","))


def size_and_sampler(config: RunConfig):
    """(height, width, sampler settings) of a run, checked."""
    from k3jax.pipelines.call_inputs import check_size, checked_sampler

    options = TextToImageOptions.from_sources(config.generate)
    height, width = check_size(config.model, *options.size(config.model))
    sampler, _ = checked_sampler(options.sampler_config(config.model))
    return height, width, sampler
