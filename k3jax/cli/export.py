# SPDX-License-Identifier: Apache-2.0
"""Convert a checkpoint of k3jax back to PyTorch's files, bit for bit.

  k3jax export weights/kandinsky3 torch/ --layout original
  k3jax export weights/kandinsky3 torch/ --lora runs/style/lora --lora-scale 0.8

With --lora, the LoRA is added to the U-Net's weights first.
"""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from k3jax.cli.flags import add_options, flag_values
from k3jax.cli.run_config import RunConfig, build, collect
from k3jax.convert.options import ExportConfig
from k3jax.pipelines.load_options import LoraOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="DIR", help="a checkpoint of k3jax")
    parser.add_argument("destination", metavar="DST", help="folder to be written")
    add_options(parser.add_argument, ExportConfig, prefix="export.")
    add_options(parser.add_argument, LoraOptions)


def run(args: argparse.Namespace) -> None:
    config = build(collect(args.config, args.overrides, flag_values(args)))

    from k3jax.convert.to_torch import export

    with _merged(args, config) as checkpoint:
        export(
            checkpoint,
            args.destination,
            config.export.layout,
            variant=config.export.variant,
            progress=args.progress,
        )
    print(args.destination)


@contextlib.contextmanager
def _merged(args: argparse.Namespace, config: RunConfig) -> Iterator[str | Path]:
    """The checkpoint; with a LoRA, a temporary one next to the destination."""
    lora = config.pipeline.lora
    if lora is None:
        yield args.checkpoint
        return
    from k3jax.training.result import merged_checkpoint

    parent = Path(args.destination).absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".merged-") as folder:
        path = Path(folder) / "checkpoint"
        merged_checkpoint(args.checkpoint, lora, path, config.pipeline.lora_scale)
        yield path
