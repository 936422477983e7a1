# SPDX-License-Identifier: Apache-2.0
"""Train a model: fine-tuning, LoRA, inpainting, DreamBooth, or from scratch.

  k3jax train --config finetune --checkpoint weights/kandinsky3 --data pictures --output run
  k3jax train --config lora --checkpoint weights/kandinsky3 --data pictures --output run
  k3jax train --config tiny

The config defines the task and its settings. The same command resumes a run where it stopped;
SIGTERM and Ctrl-C save a checkpoint first. OUTPUT gets checkpoints, metrics.jsonl, TensorBoard
files, sample grids, loss.png, and at the end a checkpoint (or LoRA) for `generate`.
"""

import argparse
import sys

from k3jax.cli.distributed import add_distributed, connect
from k3jax.cli.environment import require
from k3jax.cli.flags import add_options, add_setting, flag_values
from k3jax.cli.run_config import build, collect
from k3jax.pipelines.load_options import LoadOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", help="the weights to start from")
    for key, flag, help in (
        ("data.path", "--data PATH", "folder, tars or Parquet files with images and captions"),
        ("output", "-o --output DIR", "folder of the run"),
        ("steps", "--steps N", "updates in total"),
        ("batch_size", "--batch-size N", "samples per update over the whole mesh"),
        ("seed", "--seed N", "of weights, order, noise and dropout"),
        ("dtype", "--dtype", "dtype of the computation"),
    ):
        add_setting(add, f"train.{key}", flag, help)
    add_options(add, LoadOptions, only=("mesh",))
    add_distributed(parser)


def run(args: argparse.Namespace) -> int:
    require("train")
    connect(args.distributed, args.distributed_timeout)
    values = collect(args.config, args.overrides, flag_values(args))
    if "train" not in values:
        raise ValueError(
            "train needs a config with a task, such as --config lora; `k3jax train --help` lists "
            "the configs."
        )
    config = build(values)
    stages = {name: build(collect(name)) for name in config.train.stages} or {"": config}

    from k3jax.training.training_run import TrainingRun, train_stages

    runs = {
        name: TrainingRun(stage.train, stage.checkpoint, stage.model, stage.pipeline.mesh)
        for name, stage in stages.items()
    }
    result = train_stages(runs, args.progress)
    if result is None:
        print("k3jax: stopped; the same command resumes the run.", file=sys.stderr)
        return 1
    print(result)
    return 0
