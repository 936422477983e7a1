# SPDX-License-Identifier: Apache-2.0
"""Continue images beyond their borders.

Adds so many pixels on each side and paints them; see `k3jax inpaint`.

  k3jax outpaint "a red star" --image scene.png --right 64 --checkpoint weights/inpainting
"""

import argparse

from k3jax.cli.image_options import add_feather, add_image_options


SIDES = ("left", "top", "right", "bottom")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_options(parser)
    for side in SIDES:
        parser.add_argument(f"--{side}", type=int, default=0, metavar="PIXELS", help="to add (0)")
    add_feather(parser)
    parser.set_defaults(strength=None)


def run(args: argparse.Namespace) -> None:
    from k3jax.checkpoints.format import INPAINTING
    from k3jax.cli.image_runs import Task, run_images
    from k3jax.pipelines.inpaint import Kandinsky3InpaintPipeline

    sides = {side: getattr(args, side) for side in SIDES}
    pipeline = Kandinsky3InpaintPipeline
    run_images(args, Task("outpaint", pipeline, sides=sides, checkpoint=INPAINTING))
