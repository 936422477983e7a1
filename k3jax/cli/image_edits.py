# SPDX-License-Identifier: Apache-2.0
"""The run of img2img, inpaint and outpaint: prompts and images in, PNG files out."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k3jax.cli.environment import compile_quickly_on_cpus
from k3jax.cli.flags import add_options
from k3jax.cli.generate import IMAGES, add_inputs
from k3jax.cli.inputs import open_checkpoint, read_prompts
from k3jax.pipelines.load_options import LoadOptions
from k3jax.pipelines.options import EditOptions


if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from k3jax.pipelines.pipeline import BasePipeline

FILES = ("image", "mask_image")  # options whose flags take files
HIDDEN = 0.65  # share of grey over the repainted part, in the contact sheet
BLEND = (
    "k3jax: note: this checkpoint was not trained to inpaint: the known part is blended in at "
    "every step (method blend)."
)


def add_edit_arguments(
    parser: argparse.ArgumentParser, options: type[EditOptions], without: Sequence[str] = ()
) -> None:
    add_inputs(parser)
    add_options(parser.add_argument, options, only=FILES, without=without)
    add = parser.add_argument_group(IMAGES).add_argument
    add_options(add, options, without=[*FILES, *without])
    add_options(parser.add_argument_group("running").add_argument, LoadOptions)


def read_files(paths: Sequence[str] | None, flag: str, read: Callable[[str], Any]) -> list[Any]:
    """The files of a flag.

    Raises:
        ValueError: there is none, or one cannot be read.
    """
    if not paths:
        raise ValueError(f"give at least one {flag.strip('-')} with {flag} FILE.")
    return [read(path) for path in paths]


def run_edit(
    args: argparse.Namespace,
    pipeline: type["BasePipeline"],
    options_type: type[EditOptions],
    checkpoint: Path,
    arrays: Mapping[str, Sequence["np.ndarray"]],
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Generates and writes the images of a command.

    Args:
        checkpoint: the one to use if none is given.
        arrays: "image" and, to inpaint, "mask_image" -> what was read from the files.
        settings: recorded with every image.
    """
    compile_quickly_on_cpus()
    prompts = read_prompts(args.prompts, args.prompts_file)
    checkpoint, config = open_checkpoint(args, checkpoint)

    from k3jax.cli.image_files import plan_images, write_contact_sheet
    from k3jax.cli.image_run import ImageRun

    sources = (config.generate, config.edit)
    options = options_type.from_sources(*sources, prompt=prompts, **arrays)
    run = ImageRun.checked(pipeline, checkpoint, config, options)
    count = run.inputs.num_inputs
    arrays = {name: _each(values, count) for name, values in arrays.items()}
    images = plan_images(
        _each(prompts, count),
        options.num_images_per_prompt,
        options.seed,
        config.generate.output,
        args.overwrite,
    )

    files = {name: _each(getattr(args, name), count) for name in FILES if hasattr(args, name)}
    settings = {"task": args.command, **(settings or {})}
    if "mask_image" in arrays:
        settings["method"] = pipeline.method_of(checkpoint.config)
        if settings["method"] == "blend":
            print(BLEND, file=sys.stderr)
    small = run.write(images, args.progress, arrays, files, settings)
    cells = []
    for planned, after in zip(images, small, strict=True):
        cells += [
            (_before(planned.input, arrays, small[0].size), "before"),
            (_fitted(after, small[0].size), planned.caption),
        ]
    print(write_contact_sheet(images[0].path.parent, cells, multiple=2))


def _before(
    number: int, arrays: Mapping[str, Sequence["np.ndarray"]], size: tuple[int, int]
) -> "Image.Image":
    """An input image, with grey over the part that is repainted."""
    import numpy as np
    from PIL import Image

    image = arrays["image"][number]
    if "mask_image" in arrays:
        grey = HIDDEN * arrays["mask_image"][number][..., None]
        image = np.rint((1 - grey) * image + grey * 128).astype(np.uint8)
    return _fitted(Image.fromarray(image), size)


def _fitted(image: "Image.Image", size: tuple[int, int]) -> "Image.Image":
    from PIL import ImageOps

    return ImageOps.pad(image, size, color="white")


def _each(values: Sequence, count: int) -> list:
    """One value for all inputs, or one each."""
    return list(values) if len(values) == count else list(values) * count
