# SPDX-License-Identifier: Apache-2.0
"""The images of a run, batch by batch, each written as soon as it is made."""

import dataclasses
import gc
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, TypeVar

import jax
import numpy as np
from tqdm import tqdm

from k3jax.checkpoints.format import Checkpoint
from k3jax.cli.joining import writes
from k3jax.cli.output import PlannedImage, free_path
from k3jax.cli.run_config import RunConfig
from k3jax.config import to_dict
from k3jax.images.pngs import ContactSheet, write_png
from k3jax.model.abstract import COMPONENTS
from k3jax.model.context import PromptEmbeds
from k3jax.model.tokenizer import PromptTruncatedWarning
from k3jax.pipelines import memory
from k3jax.pipelines.loading import checked_batch_size
from k3jax.pipelines.pipeline import BasePipeline
from k3jax.pipelines.text_to_image import Kandinsky3Pipeline
from k3jax.sharding import make_meshes


Pipe = TypeVar("Pipe", bound=BasePipeline)


def make_images(
    checkpoint: Checkpoint,
    config: RunConfig,
    mesh: jax.sharding.Mesh,
    call: dict[str, Any],
    images: Sequence[PlannedImage],
    progress: bool,
) -> None:
    """Makes, writes and lists the images, and a contact sheet when there are several.

    Args:
        call: what all calls of the pipeline have in common; see `Kandinsky3Pipeline.__call__`.
    """
    pipe, embeds = load_and_encode(
        Kandinsky3Pipeline, checkpoint, config, mesh, images, call["negative_prompt"]
    )
    lora = None
    if config.pipeline.lora is not None:
        loaded = pipe.load_lora(config.pipeline.lora, config.pipeline.lora_scale)
        lora = {"fingerprint": loaded.fingerprint, "scale": config.pipeline.lora_scale}
    settings = run_settings(checkpoint, config, pipe, call) | (
        {} if lora is None else {"lora": lora}
    )
    sheet = ContactSheet(len(images), call["width"], call["height"]) if len(images) > 1 else None
    several = progress and len(images) > pipe.batch_size
    with tqdm(total=len(images), unit="image", disable=not several) as bar:
        for first in range(0, len(images), pipe.batch_size):
            batch = images[first : first + pipe.batch_size]
            made = pipe(
                **embeds.of(batch),
                seed=[planned.seed for planned in batch],
                progress_bar=progress,
                **{name: value for name, value in call.items() if name != "negative_prompt"},
            )
            for planned, image in zip(batch, made.images, strict=True) if writes() else ():
                own = {"prompt": planned.prompt, "seed": planned.seed}
                write_png(image, planned.path, {**settings, "call": {**own, **call}})
                tqdm.write(str(planned.path), file=sys.stdout)
                if sheet is not None:
                    number = planned.path.name.split("_")[0]
                    sheet.add(image, f"{number} seed {planned.seed} {planned.prompt}")
                bar.update()
    if sheet is not None and writes():
        path = free_path(images[0].path.with_name("contact_sheet.png"))
        write_png(sheet.image(), path)
        print(path)


def checked_mesh(config: RunConfig) -> jax.sharding.Mesh:
    """The mesh, checked with that of the text encoder to split a batch evenly."""
    meshes = make_meshes(config.pipeline.mesh, config.pipeline.encoder_mesh)
    checked_batch_size(config.pipeline.batch_size, *meshes)
    return meshes[0]


def check_memory(
    config: RunConfig, mesh: jax.sharding.Mesh, sizes: Sequence[tuple[int, int]], guided: bool
) -> None:
    """Refuses what cannot fit in the devices' memory; see `k3jax.pipelines.memory.check_memory`."""
    size = checked_batch_size(config.pipeline.batch_size, mesh, mesh)
    memory.check_memory(config.model, mesh, size, config.pipeline.dtype, sizes, guided)


def load_and_encode(
    kind: type[Pipe],
    checkpoint: Checkpoint,
    config: RunConfig,
    mesh: jax.sharding.Mesh,
    images: Sequence[PlannedImage],
    negative_prompt: str | None,
) -> tuple[Pipe, "Embeds"]:
    """A pipeline without a text encoder, and what that made of the prompts.

    All prompts are known, so the encoder, the largest component by far, comes first and is gone
    before the others are loaded: the devices never hold both.
    """

    def load(*components: str) -> Pipe:
        return kind.from_pretrained(
            checkpoint.path,
            mesh=mesh,
            encoder_mesh=config.pipeline.encoder_mesh,
            dtype=config.pipeline.dtype,
            param_dtype=config.pipeline.param_dtype,
            int8_text_encoder=config.pipeline.int8_text_encoder,
            stream_text_encoder=config.pipeline.stream_text_encoder,
            batch_size=config.pipeline.batch_size,
            components=components,
            config=config.model,
        )

    embeds = Embeds(load("text_encoder"), images, negative_prompt)
    gc.collect()
    return load(*(name for name in COMPONENTS if name != "text_encoder")), embeds


class Embeds:
    """The prompts of a run, each encoded once however many images it has."""

    def __init__(
        self, pipe: BasePipeline, images: Sequence[PlannedImage], negative_prompt: str | None
    ):
        prompts = list(dict.fromkeys(image.prompt for image in images))
        self._row = {prompt: row for row, prompt in enumerate(prompts)}
        self._prompts = pipe.encode_prompt(prompts)
        self._negative = None
        if negative_prompt is not None:
            with warnings.catch_warnings(record=True) as cuts:
                warnings.simplefilter("always", PromptTruncatedWarning)
                self._negative = pipe.encode_prompt(negative_prompt)
            for cut in cuts:
                message = str(cut.message).removeprefix("prompt 0 ")
                warnings.warn(f"the negative prompt {message}", cut.category, stacklevel=3)

    def of(self, batch: Sequence[PlannedImage]) -> dict[str, PromptEmbeds]:
        """The pipeline's arguments for these images."""
        rows = np.array([self._row[planned.prompt] for planned in batch])
        embeds = {"prompt_embeds": self._prompts[rows]}
        if self._negative is not None:
            embeds["negative_prompt_embeds"] = self._negative[np.zeros_like(rows)]
        return embeds


def run_settings(
    checkpoint: Checkpoint, config: RunConfig, pipe: BasePipeline, call: dict[str, Any]
) -> dict[str, Any]:
    """What an image depends on besides its call, and what decides on its last bits."""
    sampler = dataclasses.replace(
        config.model.sampler,
        name=call["sampler"],
        num_inference_steps=call["num_inference_steps"],
        guidance_scale=call["guidance_scale"],
        eta=call["eta"],
    )
    return {
        "k3jax": version("k3jax"),
        "jax": jax.__version__,
        "device": pipe.mesh.devices.flat[0].device_kind,
        "mesh": dict(pipe.mesh.shape),
        "batch_size": pipe.batch_size,
        "dtype": config.pipeline.dtype,
        "param_dtype": config.pipeline.param_dtype or config.pipeline.dtype,
        "int8_text_encoder": config.pipeline.int8_text_encoder,
        "checkpoint": {"fingerprint": checkpoint.fingerprint, "source": checkpoint.source},
        "conditioning": config.model.conditioning,
        "sampler": to_dict(sampler),
    }
