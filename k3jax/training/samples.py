# SPDX-License-Identifier: Apache-2.0
"""Pictures made with a run's weights so far, as one grid."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from k3jax import lora
from k3jax.checkpoint import Checkpoint, restore
from k3jax.config import ModelConfig
from k3jax.denoising import denoise_program, initial_carry, loop_rows, sample_keys
from k3jax.pipeline import Kandinsky3Pipeline
from k3jax.programs import decode_latents, encode_text, image_splits, initial_latents, make_contexts
from k3jax.samplers import make_sampler
from k3jax.sharding import batch_sharding, data_parallelism
from k3jax.text_projection import PromptEmbeds, window_length
from k3jax.tokenizer import Tokenizer
from k3jax.training.inpainting import inpainting_inputs
from k3jax.training.metrics import MetricWriter
from k3jax.training.result import final_weights
from k3jax.training.setup import Start
from k3jax.training.state import TrainState, with_weights
from k3jax.training.tasks import nested


MAX_SHOWN = 16


class Sampler:
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
        self._prompts = self._movq = None
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
            self._writer.images(step, "samples", reconstruction_grid(movq, self._images))
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


def embed_prompts(
    checkpoint: Checkpoint, tokenizer: Tokenizer, prompts: Sequence[str], mesh: Mesh, dtype: str
) -> PromptEmbeds:
    """Embeddings on the host, so that the text encoder need not stay on the devices."""
    encoder = restore(checkpoint, "text_encoder", mesh=mesh, param_dtype=dtype, dtype=dtype)
    ids, mask = tokenizer(prompts)
    rows = _padded(len(prompts), mesh)
    put = jax.device_put((ids[rows], mask[rows]), batch_sharding(mesh))
    embeds = np.asarray(encode_text(encoder, *put), np.float32)[: len(prompts)]
    return PromptEmbeds(embeds, mask, np.asarray(window_length(mask.sum(1)), np.int32))


def text_to_image_grid(
    model: ModelConfig,
    modules: Mapping[str, nnx.Module],
    prompts: PromptEmbeds,
    mesh: Mesh,
    size: int,
) -> np.ndarray:
    """One image of each prompt with the model's default sampler; image k has seed k."""
    rows = _padded(len(prompts), mesh)
    components = {"text_encoder": None, **modules}
    pipe = Kandinsky3Pipeline(model, None, components, mesh, batch_size=len(rows))
    made = pipe(
        prompt_embeds=prompts[rows], height=size, width=size, output_type="np", progress_bar=False
    )
    return grid(_uint8(made.images)[: len(prompts)])


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
    count = len(images)
    rows = _padded(count, mesh)
    prompts = prompts[rows]
    put = jax.device_put((prompts, images[rows], masks[rows]), batch_sharding(mesh))
    context, unconditional = make_contexts(
        modules["text_projection"], put[0], None, None, conditioning=model.conditioning
    )
    mask, masked = _inputs(modules["movq"], put[1], put[2])
    keys = jax.device_put(sample_keys(range(len(rows))), batch_sharding(mesh))
    loop = make_sampler(model.sampler)
    latents, _ = denoise_program(
        modules["unet"],
        context,
        unconditional,
        jnp.full(len(rows), model.sampler.guidance_scale, jnp.float32),
        jnp.concatenate([mask, masked], axis=-1),
        initial_carry(loop, initial_latents(keys, shape=masked.shape[1:])),
        {name: jnp.asarray(column) for name, column in loop_rows(loop).items()},
        keys,
        None,
        step=loop.step,
        stochastic=loop.stochastic,
        renoise=loop.renoise,
    )
    made = decode_latents(
        modules["movq"], latents, splits=image_splits(mesh, len(rows)), as_uint8=True
    )
    given = np.where(masks[..., None] < 1, np.uint8(128), images)
    columns = np.stack([given, np.asarray(made)[:count], images], axis=1)
    return grid(columns.reshape(-1, *images.shape[1:]), columns=3 * max(1, count // 8))


def reconstruction_grid(movq: nnx.Module, images: np.ndarray) -> np.ndarray:
    """Pairs of an image and what the autoencoder makes of it; uint8 (b, h, w, 3)."""
    pairs = np.stack([images, np.asarray(_reconstruct(movq, images))], axis=1)
    return grid(pairs.reshape(-1, *images.shape[1:]), columns=8)


def grid(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """uint8 (b, h, w, 3) -> one picture, about square unless `columns` says otherwise."""
    count, height, width, _ = images.shape
    columns = columns or int(np.ceil(count**0.5))
    rows = -(-count // columns)
    blank = np.full((rows * columns - count, height, width, 3), 255, np.uint8)
    cells = np.concatenate([images, blank]).reshape(rows, columns, height, width, 3)
    return cells.swapaxes(1, 2).reshape(rows * height, columns * width, 3)


@jax.jit
def _inputs(movq, images, masks):
    return inpainting_inputs(images, masks, movq.encode)


@jax.jit
def _reconstruct(movq, images):
    decoded = movq.decode(movq.encode(images.astype(jnp.float32) / 127.5 - 1))
    return jnp.round(jnp.clip(decoded * 0.5 + 0.5, 0, 1) * 255).astype(jnp.uint8)


def _uint8(images: np.ndarray) -> np.ndarray:
    return np.round(images * 255).astype(np.uint8)


def _padded(count: int, mesh: Mesh) -> np.ndarray:
    """Rows 0..count - 1, the last one repeated until the mesh divides them."""
    splits = data_parallelism(mesh)
    return np.minimum(np.arange(-(-count // splits) * splits), count - 1)
