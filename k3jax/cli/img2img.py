# SPDX-License-Identifier: Apache-2.0
"""Change images as a prompt says.

Writes one PNG per image in the image's own size, with all that is needed to make it again, and a
contact sheet of before and after. One prompt goes with all images, one image with all prompts.

  k3jax img2img "a blue circle" --image drawing.png --strength 0.7
  k3jax img2img "oil painting" --image a.jpg --image b.jpg --checkpoint weights/kandinsky3 -n 4

With a Flash checkpoint this refines: --strength 0.25 is its last step.
"""

import argparse

from k3jax.cli.image_options import add_image_options, add_strength


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_options(parser)
    add_strength(parser, "how much is changed, 0 to 1 (0.3)")


def run(args: argparse.Namespace) -> None:
    from k3jax.cli.image_runs import Task, run_images
    from k3jax.pipelines.image_to_image import Kandinsky3Img2ImgPipeline

    run_images(args, Task("img2img", Kandinsky3Img2ImgPipeline))
