# SPDX-License-Identifier: Apache-2.0
"""The options that img2img, inpaint and outpaint share."""

import argparse
from typing import get_args

from k3jax.cli import generate
from k3jax.config import SamplerName


SETTINGS = {
    **{flag: key for flag, key in generate.SETTINGS.items() if flag not in ("height", "width")},
    "strength": "edit.strength",
    "max_area": "edit.max_area",
    "feather": "edit.feather",
}
"""Flag -> key of RunConfig."""


def add_image_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompts", metavar="PROMPT", nargs="*", help="what to see")
    add("--prompts-file", metavar="FILE", help="one prompt per line; - reads standard input")
    add("--image", metavar="FILE", action="append", default=[], help="an image; may be repeated")
    add("--checkpoint", metavar="DIR", help="a checkpoint made by `k3jax convert`")
    add("--lora", metavar="DIR", help="a LoRA trained on that checkpoint")
    add("--lora-scale", type=float, metavar="X", help="its strength (1)")
    add("-o", "--output", metavar="DIR", help="folder of the images (out); or, of one, a .png file")
    add("--overwrite", action="store_true", help="replace images that exist")

    add = parser.add_argument_group("images (by default as the checkpoint says)").add_argument
    add("-n", "--num-images", type=int, metavar="N", help="images of each input (1)")
    add("--seed", type=int, metavar="N", help="of the first image; the next ones count up (0)")
    add("--negative-prompt", metavar="TEXT", help="what not to see")
    add("--max-area", type=int, metavar="PIXELS", help="images beyond it are worked on smaller")
    add("--sampler", choices=get_args(SamplerName), help="how the noise is removed")
    add("--steps", "--num-inference-steps", type=int, metavar="N", help="passes of the U-Net")
    add("--guidance-scale", type=float, metavar="W", help="(W + 1) conditional - W unconditional")
    add(
        "--guidance-interval",
        type=int,
        nargs=2,
        metavar=("FIRST", "LAST"),
        help="guide only these steps, counted from 0; the others cost half",
    )
    add("--eta", type=float, metavar="X", help="share of new noise in each step, 0 to 1")

    add = parser.add_argument_group("running").add_argument
    add("--mesh", help="devices, such as data=-1 (the default) or data=2,tensor=4")
    add("--dtype", choices=("bfloat16", "float32"), help="of the computation (bfloat16)")
    add("--param-dtype", choices=("bfloat16", "float32"), help="of the weights (as --dtype)")
    add("--batch-size", type=int, metavar="N", help="images at a time (one per device)")
    parser.set_defaults(feather=None)


def add_strength(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--strength", type=float, metavar="X", help=help)


def add_feather(parser: argparse.ArgumentParser) -> None:
    help = "pixels over which new and old fade into each other (8)"
    parser.add_argument("--feather", type=float, metavar="PIXELS", help=help)
