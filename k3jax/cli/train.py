# SPDX-License-Identifier: Apache-2.0
"""Train a model: fine-tuning, LoRA, inpainting, DreamBooth, or from scratch.

  k3jax train --config finetune --checkpoint weights/kandinsky3 --data pictures --output run
  k3jax train --config lora --checkpoint weights/kandinsky3 --data pictures --output run
  k3jax train --config tiny

The config says what is trained and how. A run goes on where it stopped when the same command is
given again; SIGTERM and Ctrl-C save a checkpoint first. OUTPUT gets checkpoints, metrics.jsonl,
TensorBoard files, sample grids, loss.png, and at the end a checkpoint (or LoRA) for `generate`.
"""

import argparse
import sys

from k3jax.cli.extras import require
from k3jax.cli.joining import add_distributed, join
from k3jax.cli.run_config import build, collect


SETTINGS = {
    "checkpoint": "checkpoint",
    "data": "train.data.path",
    "output": "train.output",
    "steps": "train.steps",
    "batch_size": "train.batch_size",
    "mesh": "pipeline.mesh",
    "dtype": "train.dtype",
    "seed": "train.seed",
}
"""Flag -> key of RunConfig."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", help="what to start from")
    add("--data", metavar="PATH", help="folder, tars or Parquet files with images and captions")
    add("-o", "--output", metavar="DIR", help="folder of the run")
    add("--steps", type=int, metavar="N", help="updates in all")
    add("--batch-size", type=int, metavar="N", help="samples per update over the whole mesh")
    add("--seed", type=int, metavar="N", help="of weights, order, noise and dropout")
    add("--mesh", help="devices, such as data=-1 or data=2,fsdp=4")
    add("--dtype", choices=("bfloat16", "float32"), help="of the computation")
    add_distributed(parser)


def run(args: argparse.Namespace) -> int:
    require("train")
    join(args.distributed, args.distributed_timeout)
    settings = {key: getattr(args, flag) for flag, key in SETTINGS.items()}
    values = collect(args.config, args.overrides, settings)
    if "train" not in values:
        raise ValueError(
            "train needs a config that says what to train, such as --config lora; "
            "`k3jax train --help` lists them."
        )
    config = build(values)

    from k3jax.training.training_run import TrainingRun, train_stages

    stages = config.train.stages
    runs = {name: build(collect(name)) for name in stages} if stages else {"": config}
    result = train_stages(
        {
            name: TrainingRun(run.train, run.checkpoint, run.model, run.pipeline.mesh)
            for name, run in runs.items()
        },
        args.progress,
    )
    if result is None:
        print("k3jax: stopped; the same command goes on from here.", file=sys.stderr)
        return 1
    print(result)
    return 0
