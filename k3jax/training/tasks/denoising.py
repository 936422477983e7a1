# SPDX-License-Identifier: Apache-2.0
"""The task text_to_image: a U-Net that removes noise from latents, given the caption."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from k3jax.config import COMPONENTS
from k3jax.model.context import PromptEmbeds, window_length
from k3jax.model.movq import MoVQ, normalize
from k3jax.model.tokenizer import Tokenizer
from k3jax.pipelines.text_to_image import Kandinsky3Pipeline
from k3jax.training.data.precompute import open_cache
from k3jax.training.data.training_data import Arrays, TrainingData, open_data, tokens
from k3jax.training.denoising_loss import check_loss, denoising_loss, training_context
from k3jax.training.sample_grids import embed_prompts, grid, pipeline_of
from k3jax.training.state import Weights, with_weights
from k3jax.training.tasks.task import Batch, Modules, Task
from k3jax.training.train_config import TrainConfig


class Denoising(Task):
    """Trains the U-Net, and the networks of the text that `train.components` names with it."""

    name = "text_to_image"

    def __init__(self, config, model, base, mesh):
        super().__init__(config, model, base, mesh)
        needed = ["text_projection", "unet"]
        if config.data.cache is None:
            needed = ["text_encoder", *needed, "movq"]
        self.frozen = tuple(name for name in needed if name not in self.trained)

    @classmethod
    def components(cls, config: TrainConfig) -> tuple[str, ...]:
        names, allowed = super().components(config), ("text_encoder", "text_projection", "unet")
        if "unet" not in names or not set(names) <= set(allowed):
            raise ValueError(
                f"train.components is {names}, but the task {cls.name} trains the unet and may "
                f"train {', '.join(allowed[:2])} with it."
            )
        if config.data.cache is not None and "text_encoder" in names:
            raise ValueError(
                "train.data.cache holds the embeddings of a frozen text encoder, but "
                "train.components has text_encoder: leave out one of the two."
            )
        return names

    def needed_components(self) -> list[str]:
        scratch = self.trained if self.config.from_scratch else ()
        return [name for name in COMPONENTS if name not in scratch]

    def check(self) -> None:
        super().check()
        cache = self.config.data.cache
        if cache is not None and "://" in cache:
            raise ValueError(f"train.data.cache is {cache}; it must be a local folder.")
        check_loss(self.config.loss, self.model.sampler)

    def open_data(self, tokenizer: Path, progress: bool) -> TrainingData:
        tokenize = Tokenizer(tokenizer)

        def cache(source, index):
            args = (self.config, self.name, self.base, source, index, tokenize)
            return open_cache(*args, self.cached_latents, progress)

        return open_data(
            self.config,
            lambda batch, number: self.arrays(batch, number, tokenize),
            None if self.config.data.cache is None else cache,
            self.cached_arrays,
        )

    def arrays(self, batch: Mapping[str, Any], number: int, tokenize: Tokenizer) -> Arrays:
        """Batch `number` of images and captions as arrays for the loss."""
        return {"images": batch["images"], **tokens(batch["captions"], tokenize)}

    def cached_arrays(self, batch: Mapping[str, Any], number: int) -> Arrays:
        """A batch of the cache as arrays for the loss."""
        arrays = {name: batch[name] for name in ("embeds", "attention_mask")}
        return {**arrays, "latents": np.asarray(batch["latents"], np.float32)}

    def cached_latents(self, movq: MoVQ, images: np.ndarray, sharding: NamedSharding) -> jax.Array:
        """What the cache holds for images uint8 (b, h, w, 3), apart from their captions."""
        return _encode_images(movq, jax.device_put(images, sharding))

    def modules(self, weights: Weights, frozen: Modules) -> dict[str, nnx.Module]:
        """All components: the frozen ones, and the trained ones with their weights."""
        trained = {name: with_weights(m, name, weights) for name, m in self.trained.items()}
        return {**frozen, **trained}

    def loss(self, weights, frozen, batch, key):
        modules, (key_caption, key_noise) = self.modules(weights, frozen), jax.random.split(key)
        context = training_context(
            modules["text_projection"],
            prompt_of(batch, modules),
            self.model.conditioning,
            key_caption,
            self.config.loss.caption_dropout,
        )
        return denoising_loss(
            modules["unet"],
            context,
            latents_of(batch, modules),
            key_noise,
            self.config.loss,
            self.model.sampler,
            extra_channels=self.extra_channels(batch, modules),
            weight=batch.get("weight"),
        )

    def extra_channels(self, batch: Batch, modules: Modules) -> jax.Array | None:
        """Input channels of the U-Net that follow the latents, (b, h/8, w/8, c)."""
        return None

    def sampler(self, batch, tokenizer):
        prompts = self.shown_prompts(batch)
        if not prompts:
            return None
        args = (self.base, Tokenizer(tokenizer), prompts, self.mesh, self.config.frozen_dtype)
        embeds, frozen = embed_prompts(*args), functools.cache(self.frozen_module)

        def sample(weights: Weights) -> np.ndarray:
            names = [n for n in ("text_projection", "unet", "movq") if n not in self.trained]
            modules = self.modules(weights, {name: frozen(name) for name in names})
            return self.grid(modules, embeds, batch)

        return sample

    def shown_prompts(self, batch: Batch) -> Sequence[str]:
        """The prompts of the grids."""
        return self.config.sample_prompts

    def grid(self, modules: Modules, prompts: PromptEmbeds, batch: Batch) -> np.ndarray:
        """One image of each prompt with the model's default sampler; image k has seed k."""
        pipe = pipeline_of(Kandinsky3Pipeline, self.model, modules, self.mesh, len(prompts))
        side = self.config.data.resolution
        output = pipe(prompt_embeds=prompts, height=side, width=side, progress_bar=False)
        return grid(np.stack(output.images))


def encode_images(movq: MoVQ, images: jax.Array) -> jax.Array:
    """uint8 (b, h, w, 3) -> latents float32 (b, h/8, w/8, 4)."""
    return movq.encode(normalize(images))


def prompt_of(batch: Batch, modules: Modules) -> PromptEmbeds:
    """The embeddings of a batch's captions: cached, or computed now."""
    mask = batch["attention_mask"]
    if "embeds" in batch:
        embeds = batch["embeds"].astype(jnp.float32)
    else:
        embeds = modules["text_encoder"](batch["input_ids"], mask)
    return PromptEmbeds(embeds, mask, window_length(mask.sum(1)).astype(jnp.int32))


def latents_of(batch: Batch, modules: Modules) -> jax.Array:
    """The clean latents of a batch: cached, or computed now."""
    if "latents" in batch:
        return batch["latents"].astype(jnp.float32)
    return jax.lax.stop_gradient(encode_images(modules["movq"], batch["images"]))


_encode_images = jax.jit(encode_images)
