# SPDX-License-Identifier: Apache-2.0
"""Pictures made with a run's weights so far, as one grid."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from k3jax.checkpoints.restore import Checkpoint, restore
from k3jax.config import ModelConfig
from k3jax.model import lora
from k3jax.model.abstract import COMPONENTS
from k3jax.model.context import PromptEmbeds
from k3jax.model.tokenizer import Tokenizer
from k3jax.pipelines.base_pipeline import BasePipeline
from k3jax.pipelines.inpaint import Kandinsky3InpaintPipeline
from k3jax.pipelines.text_to_image import Kandinsky3Pipeline
from k3jax.sharding import data_parallelism
from k3jax.training.metrics import MetricWriter
from k3jax.training.result import final_weights
from k3jax.training.state import TrainState, with_weights
from k3jax.training.tasks.denoising import nested
from k3jax.training.tasks.task import Start


MAX_SHOWN = 16


class SampleGrids:
    """Shows the state of a run: prompts, inpainted or rebuilt images, whatever its task is."""

    def __init__(
        self,
        start: Start,
        batch: Mapping[str, np.ndarray],
        tokenizer_folder: Path,
        writer: MetricWriter,
    ):
        """
        Args:
            batch: host arrays; its first images are what inpainting and MoVQ are shown on.
        """
        self._start, self._writer = start, writer
        config = start.config
        self._dtype = config.frozen_dtype
        self._prompts = None
        prompts = config.sample_prompts
        self._images = batch["images"][:MAX_SHOWN] if "images" in batch else None
        self._masks = batch["masks"][:MAX_SHOWN] if "masks" in batch else None
        if config.task == "inpainting":
            prompts = prompts[: 0 if self._images is None else len(self._images)]
            self._images, self._masks = (
                None if x is None else x[: len(prompts)] for x in (self._images, self._masks)
            )
        if prompts and config.task != "movq":
            tokenizer = Tokenizer(tokenizer_folder)
            args = (start.base, tokenizer, prompts, start.mesh, self._dtype)
            self._prompts = embed_prompts(*args)

    def show(self, state: TrainState, step: int) -> None:
        """Writes the grid of this step; nothing where there is nothing to show."""
        task = self._start.config.task
        if task == "movq":
            movq = with_weights(self._start.task.trained["movq"], "movq", final_weights(state))
            made = reconstruction_grid(self._start.model, movq, self._images, self._start.mesh)
            self._writer.images(step, "samples", made)
        elif self._prompts is not None:
            modules = self._modules(final_weights(state))
            model, mesh = self._start.model, self._start.mesh
            if task == "inpainting":
                args = (modules, self._prompts, self._images, self._masks, mesh)
                self._writer.images(step, "samples", inpainting_grid(model, *args))
            else:
                size = self._start.config.data.resolution
                made = text_to_image_grid(model, modules, self._prompts, mesh, size)
                self._writer.images(step, "samples", made)

    def _modules(self, weights) -> dict[str, nnx.Module]:
        start = self._start
        made = {n: with_weights(m, n, weights) for n, m in start.task.trained.items()}
        for name in ("text_projection", "unet", "movq"):
            if name not in made:
                made[name] = self._frozen(name)
        if start.config.lora is not None:
            factor = lora.update_factor(start.config.lora)
            made["unet"] = lora.apply(made["unet"], nested(weights), factor)
        return made

    @functools.cache  # noqa: B019  one sampler per run
    def _frozen(self, name: str) -> nnx.Module:
        start, dtype = self._start, self._dtype
        return restore(start.base, name, mesh=start.mesh, param_dtype=dtype, dtype=dtype)


def pipeline_of(
    kind: type[BasePipeline],
    model: ModelConfig,
    components: Mapping[str, nnx.Module],
    mesh: Mesh,
    count: int,
    tokenizer: Tokenizer | None = None,
) -> BasePipeline:
    """A pipeline of the components there are, that makes `count` images in one batch."""
    splits = data_parallelism(mesh)
    components = {**dict.fromkeys(COMPONENTS), **components}
    return kind(model, tokenizer, components, mesh, batch_size=-(-count // splits) * splits)


def embed_prompts(
    checkpoint: Checkpoint, tokenizer: Tokenizer, prompts: Sequence[str], mesh: Mesh, dtype: str
) -> PromptEmbeds:
    """Embeddings on the host, so that the text encoder need not stay on the devices."""
    encoder = restore(checkpoint, "text_encoder", mesh=mesh, param_dtype=dtype, dtype=dtype)
    components = {"text_encoder": encoder}
    args = (checkpoint.config, components, mesh, len(prompts), tokenizer)
    return pipeline_of(BasePipeline, *args).encode_prompt(prompts)


def text_to_image_grid(
    model: ModelConfig,
    modules: Mapping[str, nnx.Module],
    prompts: PromptEmbeds,
    mesh: Mesh,
    size: int,
) -> np.ndarray:
    """One image of each prompt with the model's default sampler; image k has seed k."""
    pipe = pipeline_of(Kandinsky3Pipeline, model, modules, mesh, len(prompts))
    made = pipe(prompt_embeds=prompts, height=size, width=size, progress_bar=False)
    return grid(np.stack(made.images))


def inpainting_grid(
    model: ModelConfig,
    modules: Mapping[str, nnx.Module],
    prompts: PromptEmbeds,
    images: np.ndarray,
    masks: np.ndarray,
    mesh: Mesh,
) -> np.ndarray:
    """Rows of: what the model is given, what it makes of it, what was there.

    Args:
        images: uint8 (b, h, w, 3); masks: float32 (b, h, w), 1 known.
    """
    count, height, width, _ = images.shape
    pipe = pipeline_of(Kandinsky3InpaintPipeline, model, modules, mesh, count)
    made = pipe(
        prompt_embeds=prompts,
        image=list(images),
        mask_image=list(1 - masks),
        max_area=height * width,
        paste_back=False,
        progress_bar=False,
    )
    given = np.where(masks[..., None] < 1, np.uint8(128), images)
    columns = np.stack([given, np.stack(made.images), images], axis=1)
    return grid(columns.reshape(-1, *images.shape[1:]), columns=3 * max(1, count // 8))


def reconstruction_grid(
    model: ModelConfig, movq: nnx.Module, images: np.ndarray, mesh: Mesh
) -> np.ndarray:
    """Pairs of an image and what the autoencoder makes of it; uint8 (b, h, w, 3)."""
    pipe = pipeline_of(BasePipeline, model, {"movq": movq}, mesh, len(images))
    made = pipe.decode_arrays(pipe.encode_arrays(images), "pil")
    pairs = np.stack([images, made], axis=1)
    return grid(pairs.reshape(-1, *images.shape[1:]), columns=8)


def grid(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """uint8 (b, h, w, 3) -> one picture, about square unless `columns` says otherwise."""
    count, height, width, _ = images.shape
    columns = columns or int(np.ceil(count**0.5))
    rows = -(-count // columns)
    blank = np.full((rows * columns - count, height, width, 3), 255, np.uint8)
    cells = np.concatenate([images, blank]).reshape(rows, columns, height, width, 3)
    return cells.swapaxes(1, 2).reshape(rows * height, columns * width, 3)
