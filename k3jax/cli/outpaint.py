# SPDX-License-Identifier: Apache-2.0
"""Extend images beyond their borders.

Adds pixels on each side and paints them; see `k3jax inpaint`.

  k3jax outpaint "a red star" --image scene.png --right 64 --checkpoint weights/inpainting
"""

import argparse

from k3jax.checkpoints.format import INPAINTING
from k3jax.cli.image_edits import add_edit_arguments, read_files, run_edit
from k3jax.pipelines.options import InpaintOptions


SIDES = ("left", "top", "right", "bottom")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_edit_arguments(parser, InpaintOptions, without=("mask_image", "strength"))
    for side in SIDES:
        parser.add_argument(f"--{side}", type=int, default=0, metavar="PIXELS", help="to add (0)")


def run(args: argparse.Namespace) -> None:
    from k3jax.images.compositing import extend_canvas
    from k3jax.images.masks import read_mask
    from k3jax.images.reading import read_image
    from k3jax.pipelines.inpaint import Kandinsky3InpaintPipeline

    sides = {side: getattr(args, side) for side in SIDES}
    canvases = read_files(args.image, "--image", lambda path: extend_canvas(path, **sides))
    arrays = {
        "image": [read_image(canvas) for canvas, _ in canvases],
        "mask_image": [read_mask(mask) for _, mask in canvases],
    }
    settings = {"extend_canvas": sides}
    run_edit(args, Kandinsky3InpaintPipeline, InpaintOptions, INPAINTING, arrays, settings)
