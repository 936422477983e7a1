# SPDX-License-Identifier: Apache-2.0
"""Repaint a part of images.

A mask is an image of the size of its image, white where to repaint. One prompt, image or mask
serves all. The rest of an image does not change, except in a feather around the mask.

  k3jax inpaint "a red star" --image scene.png --mask mask.png --checkpoint weights/inpainting

Without --checkpoint (and without a config that names one) this uses the small inpainting model that
comes with k3jax. It paints coloured shapes and knows nothing else.

A checkpoint with 9 input channels was trained for inpainting. With any other, the known part is
blended in at every step, and a note says so. Writes one PNG per image, in the size of the input
image, and a contact sheet of before and after.
"""

import argparse

from k3jax.checkpoints.format import INPAINTING
from k3jax.cli.image_edits import add_edit_arguments, read_files, run_edit
from k3jax.pipelines.options import InpaintOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_edit_arguments(parser, InpaintOptions)


def run(args: argparse.Namespace) -> None:
    from k3jax.images.masks import read_mask
    from k3jax.images.reading import read_image
    from k3jax.pipelines.inpaint import Kandinsky3InpaintPipeline

    arrays = {
        "image": read_files(args.image, "--image", read_image),
        "mask_image": read_files(args.mask_image, "--mask", read_mask),
    }
    run_edit(args, Kandinsky3InpaintPipeline, InpaintOptions, INPAINTING, arrays)
