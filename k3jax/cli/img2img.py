# SPDX-License-Identifier: Apache-2.0
"""Change images according to a prompt.

Writes one PNG per image, in the size of the input image and with all its settings, and a contact
sheet of before and after. One prompt serves all images, and one image serves all prompts.

  k3jax img2img "a blue circle" --image drawing.png --strength 0.7
  k3jax img2img "oil painting" --image a.jpg --image b.jpg --checkpoint weights/kandinsky3 -n 4

With a Flash checkpoint this refines an image: --strength 0.25 runs its last step.
"""

import argparse

from k3jax.checkpoints.format import DEFAULT
from k3jax.cli.image_edits import add_edit_arguments, read_files, run_edit
from k3jax.pipelines.options import ImageToImageOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_edit_arguments(parser, ImageToImageOptions)


def run(args: argparse.Namespace) -> None:
    from k3jax.images.reading import read_image
    from k3jax.pipelines.image_to_image import Kandinsky3Img2ImgPipeline

    images = read_files(args.image, "--image", read_image)
    run_edit(args, Kandinsky3Img2ImgPipeline, ImageToImageOptions, DEFAULT, {"image": images})
