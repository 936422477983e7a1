# SPDX-License-Identifier: Apache-2.0
"""The options that img2img, inpaint and outpaint share."""

import argparse

from k3jax.cli import generate


SETTINGS = {
    **{flag: key for flag, key in generate.SETTINGS.items() if flag not in ("height", "width")},
    "strength": "edit.strength",
    "max_area": "edit.max_area",
    "feather": "edit.feather",
}
"""Flag -> key of RunConfig."""


def add_image_options(parser: argparse.ArgumentParser) -> None:
    generate.add_inputs(parser)
    image = "an image; may be repeated"
    parser.add_argument("--image", metavar="FILE", action="append", default=[], help=image)
    add = parser.add_argument_group(generate.IMAGES).add_argument
    add("-n", "--num-images", type=int, metavar="N", help="images of each input (1)")
    add("--max-area", type=int, metavar="PIXELS", help="images beyond it are worked on smaller")
    generate.add_sampling(add)
    generate.add_running(parser)
    parser.set_defaults(feather=None)


def add_strength(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--strength", type=float, metavar="X", help=help)


def add_feather(parser: argparse.ArgumentParser) -> None:
    help = "pixels over which new and old fade into each other (8)"
    parser.add_argument("--feather", type=float, metavar="PIXELS", help=help)
