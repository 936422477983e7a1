# SPDX-License-Identifier: Apache-2.0
"""Tell what a TPU slice would make of it, without a TPU: memory, time, cost.

  k3jax plan --topology v5e:2x4 --batch 8 --price-per-chip-hour 1.2
  k3jax plan --topology v6e:1x1 --config flash --json

The text encoder, one denoising step and the decoder are compiled for the slice, without weights, by
the real TPU compiler (pip install 'k3jax[tpu]'; Linux). The full-size model takes 5 to 15 minutes a
program. What does not fit is refused, with the largest batch that does. Without --config or
--checkpoint, this is Kandinsky 3 (`kandinsky3`).
"""

import argparse
import json
import os
import sys
from pathlib import Path

from k3jax.cli.generate import add_dtypes, add_sampler, asked_checkpoint
from k3jax.cli.run_config import RunConfig, build, collect


SETTINGS = {
    "checkpoint": "checkpoint",
    "height": "generate.height",
    "width": "generate.width",
    "steps": "generate.num_inference_steps",
    "guidance_scale": "generate.guidance_scale",
    "guidance_interval": "generate.guidance_interval",
    "sampler": "generate.sampler",
    "mesh": "pipeline.mesh",
    "encoder_mesh": "pipeline.encoder_mesh",
    "dtype": "pipeline.dtype",
    "param_dtype": "pipeline.param_dtype",
    "int8_text_encoder": "pipeline.int8_text_encoder",
}
"""Flag -> key of RunConfig."""

DEFAULT_CONFIG = "kandinsky3"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--topology", metavar="CHIP:SHAPE", help="a slice, such as v5e:2x4 or v5p:2x2x1")
    add_work(add)
    add("--price-per-chip-hour", type=float, metavar="DOLLARS", help="for dollars per 1,000 images")
    add("--json", action="store_true", help="one JSON object")


def add_work(add) -> None:
    """What is made at a time, and how; `add` is the add_argument of a parser."""
    add(
        "--batch",
        type=int,
        default=1,
        metavar="N",
        help="images on each chip at a time (1); all chips make N times data x fsdp of the mesh",
    )
    add("--checkpoint", metavar="DIR", help="its architecture and sampler")
    add("--height", type=int, metavar="PIXELS", help="a multiple of 64")
    add("--width", type=int, metavar="PIXELS", help="a multiple of 64")
    add_sampler(add, guidance_scale="0: one U-Net pass a step, not two")
    add("--mesh", help="chips, such as data=-1 (the default) or data=2,fsdp=4")
    add("--encoder-mesh", metavar="MESH", help="for the text encoder (as --mesh, if that fits it)")
    add("--programs", metavar="LIST", help="some of encode,denoise,decode (all)")
    add_dtypes(add, "bfloat16")


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
    # Nothing runs here, so no accelerator is looked for: that may take minutes where there is none.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    from k3jax.planning.compiler import check_libtpu, compile_in_child
    from k3jax.planning.plan import make_plan
    from k3jax.planning.report import to_json, to_lines

    question = _question(args, where, config)
    check_libtpu()

    def say(text: str) -> None:
        if not args.no_progress:
            print(f"k3jax: {text}", file=sys.stderr, flush=True)

    plan = make_plan(
        question, lambda program, work: compile_in_child(program, work, where, say), say
    )
    print(json.dumps(to_json(plan)) if args.json else "\n".join(to_lines(plan)))


def run_config(args: argparse.Namespace, default: str) -> RunConfig:
    """The run, with the model of the checkpoint or of the config, or of the config `default`."""
    name = args.config
    if name is None and args.checkpoint is None:
        name = default
    values = collect(name, args.overrides, {f: getattr(args, k) for k, f in SETTINGS.items()})
    own = None
    place, has_model = values.get("checkpoint"), bool(values.get("model"))
    # A config may name a checkpoint that is still to be made: plans come first.
    if args.checkpoint is not None or (place and not has_model and Path(place).exists()):
        own = asked_checkpoint(values, named_by_config=args.checkpoint is None).config
    elif not has_model:  # a config of a machine, or of a training
        own = build(collect(default, [], {})).model
    return build(values, own)


def _question(args: argparse.Namespace, where, config: RunConfig):
    from k3jax.planning.question import Question

    height, width, sampler = size_and_sampler(config)
    pipeline = config.pipeline
    return Question(
        where=where,
        model=config.model,
        sampler=sampler,
        batch=args.batch,
        height=height,
        width=width,
        mesh=pipeline.mesh,
        encoder_mesh=pipeline.encoder_mesh,
        guidance_interval=config.generate.guidance_interval,
        dtype=pipeline.dtype,
        param_dtype=pipeline.param_dtype or pipeline.dtype,
        int8_text_encoder=pipeline.int8_text_encoder,
        parts=parts(args),
        price=args.price_per_chip_hour,
    )


def parts(args: argparse.Namespace) -> tuple[str, ...]:
    """What --programs asks for."""
    from k3jax.planning.question import PARTS

    return PARTS if args.programs is None else tuple(args.programs.replace(" ", "").split(","))


def size_and_sampler(config: RunConfig):
    """(height, width, sampler settings) of a run, checked."""
    from k3jax.pipelines import call_inputs
    from k3jax.pipelines.options import TextToImageOptions

    model, wanted = config.model, config.generate
    options = TextToImageOptions.from_sources(wanted)
    height, width = call_inputs.check_size(model, *options.size(model))
    sampler, _ = call_inputs.checked_sampler(options.sampler_config(model))
    call_inputs.guidance_scales(sampler.guidance_scale, 1)
    return height, width, sampler
