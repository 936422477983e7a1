# SPDX-License-Identifier: Apache-2.0
"""Generate images from prompts.

Writes one PNG per image, with all its settings in its text chunks, and a contact sheet when there
are several. The path of each image is printed when it is written. Image k of a run has the seed
SEED + k, and does not depend on the other images of the run.

  k3jax generate "a red circle" "a blue square" --checkpoint weights/kandinsky3 --num-images 4
  k3jax generate --prompts-file prompts.txt --config flash --output pictures

Without --checkpoint (and without a config that names one) this uses the small model that comes with
k3jax. It draws scenes of coloured shapes and knows nothing else.
"""

import argparse

from k3jax.cli.distributed import add_distributed, connect
from k3jax.cli.environment import compile_quickly_on_cpus
from k3jax.cli.flags import add_options, add_setting
from k3jax.cli.inputs import open_checkpoint, read_prompts
from k3jax.pipelines.load_options import LoadOptions, LoraOptions
from k3jax.pipelines.options import CallOptions, TextToImageOptions


IMAGES = "images (default: the checkpoint's values)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_inputs(parser)
    add_options(parser.add_argument_group(IMAGES).add_argument, TextToImageOptions)
    add_options(parser.add_argument_group("running").add_argument, LoadOptions)
    add_distributed(parser)


def add_inputs(parser: argparse.ArgumentParser, options: type[CallOptions] | None = None) -> None:
    """The prompts, weights and files of a command that generates images."""
    add = parser.add_argument
    add("prompts", metavar="PROMPT", nargs="*", help="what to see")
    add("--prompts-file", metavar="FILE", help="one prompt per line; - reads standard input")
    add("--checkpoint", metavar="DIR", help="a checkpoint written by `k3jax convert`")
    add_options(add, LoraOptions)
    add_setting(add, "generate.output", "-o --output DIR", "folder (out), or for one image a .png")
    add("--overwrite", action="store_true", help="replace images that exist")


def run(args: argparse.Namespace) -> None:
    compile_quickly_on_cpus()
    connect(args.distributed, args.distributed_timeout)
    prompts = read_prompts(args.prompts, args.prompts_file)
    checkpoint, config = open_checkpoint(args)

    from k3jax.cli.distributed import is_writer
    from k3jax.cli.image_files import plan_images, write_contact_sheet
    from k3jax.cli.image_run import ImageRun
    from k3jax.pipelines.text_to_image import Kandinsky3Pipeline

    options = TextToImageOptions.from_sources(config.generate, prompt=prompts)
    run = ImageRun.checked(Kandinsky3Pipeline, checkpoint, config, options)
    images = plan_images(
        prompts,
        options.num_images_per_prompt,
        options.seed,
        config.generate.output,
        args.overwrite,
    )

    small = run.write(images, args.progress)
    if len(images) > 1 and is_writer():
        cells = [(image, planned.caption) for image, planned in zip(small, images, strict=True)]
        print(write_contact_sheet(images[0].path.parent, cells))
