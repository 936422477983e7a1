# SPDX-License-Identifier: Apache-2.0
"""Turn a checkpoint of k3jax back into PyTorch's files, bit for bit.

k3jax export weights/kandinsky3 torch/ --layout original
"""

import argparse

from k3jax.run_config import build, collect


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


def run(args: argparse.Namespace) -> None:
    settings = {"export.layout": args.layout, "export.variant": args.variant}
    config = build(collect(args.config, args.overrides, settings))

    from k3jax.convert.to_torch import export

    export(
        args.checkpoint,
        args.destination,
        config.export.layout,
        variant=config.export.variant,
        progress=args.progress,
    )
    print(args.destination)
