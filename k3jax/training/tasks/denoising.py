# SPDX-License-Identifier: Apache-2.0
"""What each task trains, and its loss as a function of the trained weights.

A batch is a dict of arrays, batch first; what is frozen and the same every time may have been
computed beforehand:

    images uint8 (b, h, w, 3)           or  latents (b, h/8, w/8, 4)
    input_ids (b, n)                    or  embeds (b, n, d_model)
    attention_mask bool (b, n)              with either
    masks float32 (b, h, w) with images, or, for inpainting,
    mask (b, h/8, w/8, 1) and masked_latents (b, h/8, w/8, 4) with latents
    weight float32 (b,)                 optional, of each sample
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from k3jax.config import ModelConfig
from k3jax.model import lora
from k3jax.model.context import PromptEmbeds, window_length
from k3jax.model.inpainting_inputs import inpainting_inputs
from k3jax.model.movq import MoVQ, normalize
from k3jax.training.denoising_loss import denoising_loss, training_context
from k3jax.training.state import Weights, with_weights
from k3jax.training.tasks import reading as scene_text
from k3jax.training.tasks.autoencoder import movq_loss
from k3jax.training.train_config import TrainConfig


Batch = Mapping[str, jax.Array]
Modules = Mapping[str, nnx.Module]


@dataclass(frozen=True)
class Task:
    """Attributes:
    trained: abstract modules of the trained components, in the dtype of the computation.
    frozen: names of the components that the loss needs besides.
    loss: (weights, frozen modules, batch, key) -> (scalar, metrics).
    fixed: beginnings of the names of trained components' weights that stay as they are.
    """

    trained: dict[str, nnx.Module]
    frozen: tuple[str, ...]
    loss: Callable[[Weights, Modules, Batch, jax.Array], tuple[jax.Array, dict]]
    fixed: tuple[str, ...] = ()


def encode_images(movq: MoVQ, images: jax.Array) -> jax.Array:
    """uint8 (b, h, w, 3) -> latents float32 (b, h/8, w/8, 4)."""
    return movq.encode(normalize(images))


def prompt_of(batch: Batch, modules: Modules) -> PromptEmbeds:
    """The embeddings of a batch's captions, encoded here unless they were before."""
    mask = batch["attention_mask"]
    if "embeds" in batch:
        embeds = batch["embeds"].astype(jnp.float32)
    else:
        embeds = modules["text_encoder"](batch["input_ids"], mask)
    return PromptEmbeds(embeds, mask, window_length(mask.sum(1)).astype(jnp.int32))


def latents_of(batch: Batch, modules: Modules) -> jax.Array:
    """The clean latents of a batch, encoded here unless they were before."""
    if "latents" in batch:
        return batch["latents"].astype(jnp.float32)
    return jax.lax.stop_gradient(encode_images(modules["movq"], batch["images"]))


def extra_channels_of(batch: Batch, modules: Modules) -> jax.Array:
    """Mask and masked latents, (b, h/8, w/8, 5)."""
    if "masked_latents" in batch:
        mask, masked = batch["mask"], batch["masked_latents"]
    else:
        mask, masked = inpainting_inputs(batch["images"], batch["masks"], modules["movq"].encode)
    return jnp.concatenate([mask, jax.lax.stop_gradient(masked)], axis=-1).astype(jnp.float32)


def denoising_task(
    config: TrainConfig, model: ModelConfig, modules: Modules, *, cached: bool
) -> Task:
    """Text to image or inpainting: the U-Net, and what `config.components` names besides.

    Args:
        modules: abstract, in the dtype of the computation.
        cached: batches bring latents and text embeddings.
    """
    trained = {name: modules[name] for name in config.components}
    needed = ["text_projection", "unet"]
    if not cached or "text_encoder" in trained:
        needed.insert(0, "text_encoder")
    if not cached:
        needed.append("movq")
    frozen = tuple(name for name in needed if name not in trained)

    def loss(weights, given, batch, key):
        here = dict(given)
        for name, module in trained.items():
            here[name] = with_weights(module, name, weights)
        return _denoising_loss(config, model, here, batch, key)

    return Task(trained, frozen, loss)


def lora_task(
    config: TrainConfig, model: ModelConfig, modules: Modules, factor: float, *, cached: bool
) -> Task:
    """Low-rank updates of the U-Net's attention; every component is frozen.

    The weights are `lora_weights`: "NAME.a" and "NAME.b" of each linear layer.
    """
    frozen = ("text_projection", "unet") if cached else tuple(modules)

    def loss(weights, given, batch, key):
        unet = lora.apply(given["unet"], nested(weights), factor)
        return _denoising_loss(config, model, {**given, "unet": unet}, batch, key)

    return Task({}, frozen, loss)


def movq_task(modules: Modules, *, decoder_only: bool) -> Task:
    """The autoencoder, or of it only what comes behind the latents."""
    fixed = ("movq.encoder.", "movq.quant_conv.") if decoder_only else ()

    def loss(weights, given, batch, key):
        weights = {
            name: jax.lax.stop_gradient(value) if name.startswith(fixed) else value
            for name, value in weights.items()
        }
        return movq_loss(with_weights(modules["movq"], "movq", weights), batch["images"], key)

    return Task({"movq": modules["movq"]}, (), loss, fixed)


def reading_task(modules: Modules) -> Task:
    """The text encoder from scratch, with the heads that ask it."""
    heads = scene_text.ReadingHeads(modules["text_encoder"].config.d_model, seed=0)
    trained = {"text_encoder": modules["text_encoder"], "reading_heads": heads}

    def loss(weights, given, batch, key):
        here = {name: with_weights(module, name, weights) for name, module in trained.items()}
        labels = {name: batch[name] for name in scene_text.QUESTIONS}
        return scene_text.reading_loss(
            here["text_encoder"],
            here["reading_heads"],
            batch["input_ids"],
            batch["attention_mask"],
            batch["nouns"],
            labels,
        )

    return Task(trained, (), loss)


def nested(weights: Weights) -> dict[str, dict[str, jax.Array]]:
    """{"x.y.a": ..., "x.y.b": ...} -> {"x.y": {"a": ..., "b": ...}}: what `model.lora` takes."""
    layers: dict[str, dict[str, jax.Array]] = {}
    for name, value in weights.items():
        layer, _, part = name.rpartition(".")
        layers.setdefault(layer, {})[part] = value
    return layers


def flattened(layers: Mapping[str, Mapping[str, jax.Array]]) -> Weights:
    """The inverse of `nested`."""
    return {f"{name}.{part}": value for name, ab in layers.items() for part, value in ab.items()}


def _denoising_loss(config, model, modules, batch, key):
    key_caption, key_noise = jax.random.split(key)
    context = training_context(
        modules["text_projection"],
        prompt_of(batch, modules),
        model.conditioning,
        key_caption,
        config.loss.caption_dropout,
    )
    extra = extra_channels_of(batch, modules) if config.task == "inpainting" else None
    return denoising_loss(
        modules["unet"],
        context,
        latents_of(batch, modules),
        key_noise,
        config.loss,
        model.sampler,
        extra_channels=extra,
        weight=batch.get("weight"),
    )
