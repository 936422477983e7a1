# SPDX-License-Identifier: Apache-2.0
"""The runs of img2img, inpaint and outpaint: everything checked, then image by image."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from PIL import Image, ImageOps
from tqdm import tqdm

from k3jax.arguments import check_number
from k3jax.checkpoints.packaged import DEFAULT
from k3jax.cli.batches import check_memory, checked_mesh, load_and_encode, run_settings
from k3jax.cli.generate import NOTE, asked_checkpoint, check_architecture, check_lora
from k3jax.cli.image_options import SETTINGS
from k3jax.cli.output import PlannedImage, check_folder, free_path, plan
from k3jax.cli.prompts import check_prompts, read_prompts
from k3jax.cli.quick_compiles import compile_quickly_on_cpus
from k3jax.cli.run_config import RunConfig, build, collect
from k3jax.config import ModelConfig
from k3jax.images.compositing import extend_canvas
from k3jax.images.masks import read_mask
from k3jax.images.pngs import ContactSheet, write_png
from k3jax.images.reading import read_image
from k3jax.pipelines import call_inputs
from k3jax.pipelines.call_inputs import CallInputs
from k3jax.pipelines.compilation_cache import enable_compilation_cache
from k3jax.pipelines.image_inputs import Pair, pairs, step_counts, work_sizes
from k3jax.pipelines.options import ImageToImageOptions
from k3jax.pipelines.pipeline import BasePipeline


STRENGTHS = {"img2img": 0.3, "inpaint": 1.0, "outpaint": 1.0}
CELL = (512, 512)  # the most that an image takes of the contact sheet
HIDDEN = 0.65  # share of grey over what is to be painted, in the contact sheet


@dataclass(frozen=True)
class Task:
    """A command: its pipeline, and what comes beside the images.

    Attributes:
        checkpoint: where none is asked for.
    """

    name: str
    pipeline: type[BasePipeline]
    masks: Sequence[str] = ()
    sides: dict[str, int] = field(default_factory=dict)
    checkpoint: Path = DEFAULT


@dataclass(frozen=True)
class Job:
    """One image to be made.

    Attributes:
        given: which input it is made of.
        call: what of the pipeline's arguments is its own, for the PNG.
    """

    planned: PlannedImage
    given: int
    call: dict[str, Any]


def run_images(args: argparse.Namespace, task: Task) -> None:
    """What the command does.

    Raises:
        ValueError: one sentence, before any weights are read.
    """
    compile_quickly_on_cpus()
    settings = {key: getattr(args, flag) for flag, key in SETTINGS.items()}
    values = collect(args.config, args.overrides, settings)
    prompts = read_prompts(args.prompts, args.prompts_file)
    if not args.image:
        raise ValueError("give at least one image with --image FILE.")
    checkpoint = asked_checkpoint(values, args.checkpoint is None, task.checkpoint)
    config = build(values, checkpoint.config)
    if values.get("model"):
        check_architecture(checkpoint, config)
    task.pipeline.check_config(config.model)
    check_prompts(prompts, config.generate.negative_prompt)
    inputs = _inputs(args.image, task, prompts)
    mesh = checked_mesh(config)
    check_lora(config)
    call = _checked_call(config, mesh, task, inputs)
    files = {"images": args.image, "masks": task.masks}
    prompts, *files = (_each(x, len(inputs)) for x in (prompts, *files.values()))
    planned = plan(
        prompts,
        config.generate.num_images_per_prompt,
        config.generate.seed,
        config.generate.output,
        args.overwrite,
    )
    jobs = []
    for number, one in enumerate(planned):
        given = number // config.generate.num_images_per_prompt
        own = {"prompt": one.prompt, "seed": one.seed, "image": files[0][given]}
        if task.masks:
            own["mask_image"] = files[1][given]
        jobs.append(Job(one, given, own))
    check_folder(planned[0].path.parent)
    enable_compilation_cache()
    if values.get("checkpoint") is None:
        print(NOTE, file=sys.stderr)
    _make(checkpoint, config, mesh, task, call, inputs, jobs, args.progress)


def _inputs(images: Sequence[str], task: Task, prompts: Sequence[str]) -> list[Pair]:
    """One image (and mask, all black where the task has none) for each input."""
    counts = {"prompts": len(prompts), "images": len(images)}
    if task.masks:
        counts["masks"] = len(task.masks)
    count = call_inputs.paired(counts)
    if task.sides:
        made = [extend_canvas(image, **task.sides) for image in images]
        read = [Pair(read_image(canvas), read_mask(mask)) for canvas, mask in made]
        return _each(read, count)
    arrays = [read_image(image) for image in images]
    if task.masks:
        return pairs(arrays, [read_mask(mask) for mask in task.masks], count)
    return _each([Pair(array, np.zeros(array.shape[:2], np.float32)) for array in arrays], count)


def _checked_call(
    config: RunConfig, mesh: Mesh, task: Task, inputs: Sequence[Pair]
) -> dict[str, Any]:
    """The arguments that are equal for all calls of the pipeline."""
    wanted, edit, model = config.generate, config.edit, config.model
    strength = STRENGTHS[task.name] if edit.strength is None else edit.strength
    options = ImageToImageOptions.from_sources(
        wanted, prompt=[""] * len(inputs), negative_prompt=None, strength=strength
    )
    checked = CallInputs(options, model)
    steps = step_counts(checked)[0]
    if not steps and task.name != "img2img":
        raise ValueError("--strength is 0, which repaints nothing: give more.")
    if edit.feather is not None:
        check_number(edit.feather, "feather", least=0)
    sizes = work_sizes(model, [pair.image for pair in inputs], edit.max_area)
    if steps:
        check_memory(config, mesh, sizes, checked.guided)
    call = {
        "negative_prompt": wanted.negative_prompt,
        "strength": strength,
        "num_inference_steps": _own(wanted.num_inference_steps, model, "num_inference_steps"),
        "guidance_scale": _own(wanted.guidance_scale, model, "guidance_scale"),
        "guidance_interval": wanted.guidance_interval,
        "sampler": _own(wanted.sampler, model, "name"),
        "eta": _own(wanted.eta, model, "eta"),
        "max_area": edit.max_area,
    }
    return call if task.name == "img2img" else {**call, "feather": edit.feather}


def _make(checkpoint, config: RunConfig, mesh, task: Task, call, inputs, jobs, progress) -> None:
    planned = [job.planned for job in jobs]
    pipe, embeds = load_and_encode(
        task.pipeline, checkpoint, config, mesh, planned, call["negative_prompt"]
    )
    settings = run_settings(checkpoint, config, pipe, call) | {"task": task.name}
    if config.pipeline.lora is not None:
        loaded = pipe.load_lora(config.pipeline.lora, config.pipeline.lora_scale)
        settings["lora"] = {"fingerprint": loaded.fingerprint, "scale": config.pipeline.lora_scale}
    if task.name != "img2img":
        settings |= {"method": pipe.method}
        if pipe.method == "blend":
            print(
                "k3jax: note: this checkpoint was not trained to inpaint: the known part is "
                "blended in at every step (method blend).",
                file=sys.stderr,
            )
    if task.sides:
        settings |= {"extend_canvas": task.sides}
    arguments = {name: value for name, value in call.items() if name != "negative_prompt"}
    made: dict[str, Image.Image] = {}
    several = progress and len(jobs) > pipe.batch_size
    with tqdm(total=len(jobs), unit="image", disable=not several) as bar:
        for batch in _batches(jobs, inputs, config, pipe.batch_size):
            beside = {"image": [inputs[job.given].image for job in batch]}
            if task.name != "img2img":
                beside["mask_image"] = [inputs[job.given].mask for job in batch]
            images = pipe(
                **embeds.of([job.planned for job in batch]),
                **beside,
                **arguments,
                seed=[job.planned.seed for job in batch],
                progress_bar=progress,
            ).images
            for job, image in zip(batch, images, strict=True):
                own = {**settings, "call": {**job.call, **call}}
                write_png(image, job.planned.path, own)
                tqdm.write(str(job.planned.path), file=sys.stdout)
                made[str(job.planned.path)] = ImageOps.contain(image, CELL)
                bar.update()
    _write_sheet(jobs, inputs, made)


def _batches(jobs: Sequence[Job], inputs, config: RunConfig, size: int):
    """Jobs of one working size together, so that few batches are padded."""
    sizes = work_sizes(config.model, [pair.image for pair in inputs], config.edit.max_area)
    for wanted in dict.fromkeys(sizes):
        same = [job for job in jobs if sizes[job.given] == wanted]
        yield from (same[first : first + size] for first in range(0, len(same), size))


def _write_sheet(jobs: Sequence[Job], inputs: Sequence[Pair], made) -> None:
    """Pairs of before and after.

    Args:
        made: path -> the image there, small.
    """
    width, height = made[str(jobs[0].planned.path)].size
    sheet = ContactSheet(2 * len(jobs), width, height, multiple=2)
    for job in jobs:
        image, mask = inputs[job.given]
        grey = HIDDEN * mask[..., None]
        before = np.rint((1 - grey) * image + grey * 128).astype(np.uint8)
        path = job.planned.path
        caption = f"{path.name.split('_')[0]} seed {job.planned.seed} {job.planned.prompt}"
        for shown, text in ((Image.fromarray(before), "before"), (made[str(path)], caption)):
            sheet.add(ImageOps.pad(shown, (width, height), color="white"), text)
    path = free_path(Path(jobs[0].planned.path).with_name("contact_sheet.png"))
    write_png(sheet.image(), path)
    print(path)


def _each(values: Sequence, count: int) -> list:
    return list(values) if len(values) == count else list(values) * count


def _own(value, model: ModelConfig, name: str):
    return getattr(model.sampler, name) if value is None else value
