# SPDX-License-Identifier: Apache-2.0
"""Turn a checkpoint of k3jax back into PyTorch's files, bit for bit.

  k3jax export weights/kandinsky3 torch/ --layout original
  k3jax export weights/kandinsky3 torch/ --lora runs/style/lora --lora-scale 0.8

With --lora, the LoRA is added to the U-Net's weights first.
"""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from k3jax.cli.run_config import build, collect


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="DIR", help="a checkpoint of k3jax")
    parser.add_argument("destination", metavar="DST", help="folder to be made")
    parser.add_argument(
        "--layout",
        choices=("diffusers", "original"),
        help="diffusers (the default): for Kandinsky3Pipeline.from_pretrained; "
        "original: kandinsky3.pt, movq.pt, ...",
    )
    parser.add_argument(
        "--variant",
        choices=("base", "flash", "inpainting"),
        help="for the names of the original files; by default what it was converted from",
    )
    parser.add_argument("--lora", metavar="DIR", help="a LoRA to be merged into the U-Net")
    parser.add_argument(
        "--lora-scale", type=float, default=1.0, metavar="X", help="its strength (1)"
    )


def run(args: argparse.Namespace) -> None:
    settings = {"export.layout": args.layout, "export.variant": args.variant}
    config = build(collect(args.config, args.overrides, settings))

    from k3jax.convert.to_torch import export

    with _merged(args) as checkpoint:
        export(
            checkpoint,
            args.destination,
            config.export.layout,
            variant=config.export.variant,
            progress=args.progress,
        )
    print(args.destination)


@contextlib.contextmanager
def _merged(args: argparse.Namespace) -> Iterator[str | Path]:
    """The checkpoint; with a LoRA, one beside the destination that is removed afterwards."""
    if args.lora is None:
        yield args.checkpoint
        return
    from k3jax.training.result import merged_checkpoint

    parent = Path(args.destination).absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".merged-") as folder:
        path = Path(folder) / "checkpoint"
        merged_checkpoint(args.checkpoint, args.lora, path, args.lora_scale)
        yield path
