# SPDX-License-Identifier: Apache-2.0
"""Paint a part of images anew.

Masks are images of the size of theirs, white where something new goes. One prompt, image or mask
goes with all. The rest of an image stays exactly as it is, but for a feather around the mask.

  k3jax inpaint "a red star" --image scene.png --mask mask.png --checkpoint weights/inpainting

Without --checkpoint (and without a config that names one) the small inpainting model that comes
with k3jax is used. It paints coloured shapes and knows nothing else.

A checkpoint with 9 input channels was trained for this; with any other the known part is blended in
at every step, and a note says so. Writes one PNG per image in the image's own size, and a contact
sheet of before and after.
"""

import argparse

from k3jax.cli.image_options import add_feather, add_image_options, add_strength


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_options(parser)
    parser.add_argument(
        "--mask", metavar="FILE", action="append", default=[], help="white where to paint anew"
    )
    add_strength(parser, "1 paints from noise, less from what lies under the mask (1)")
    add_feather(parser)


def run(args: argparse.Namespace) -> None:
    from k3jax.checkpoints.format import INPAINTING
    from k3jax.cli.image_runs import Task, run_images
    from k3jax.pipelines.inpaint import Kandinsky3InpaintPipeline

    if not args.mask:
        raise ValueError("give at least one mask with --mask FILE.")
    pipeline = Kandinsky3InpaintPipeline
    run_images(args, Task("inpaint", pipeline, masks=args.mask, checkpoint=INPAINTING))
