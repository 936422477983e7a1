# SPDX-License-Identifier: Apache-2.0
"""Pipelines without weights: everything is checked, nothing is compiled, images are black."""

import contextlib
import functools

import jax
import numpy as np
import pytest

from k3jax.checkpoints.format import read_checkpoint
from k3jax.config import MAX_TOKENS
from k3jax.model.abstract import abstract_module
from k3jax.model.context import PromptEmbeds
from k3jax.model.tokenizer import Tokenizer
from k3jax.pipelines import image_to_image, inpaint, text_to_image
from k3jax.pipelines.pipeline import BasePipeline
from k3jax.sharding import make_mesh


CHECKPOINT = read_checkpoint("tiny")
CONFIG = CHECKPOINT.config
KINDS = {
    "text_to_image": text_to_image.Kandinsky3Pipeline,
    "image_to_image": image_to_image.Kandinsky3Img2ImgPipeline,
    "inpaint": inpaint.Kandinsky3InpaintPipeline,
}


@functools.cache
def unet():
    return abstract_module("unet", CONFIG, "bfloat16", "bfloat16")


def pipeline(kind, mesh="data=1", devices=1, batch_size=4, tokenizer=None):
    """A pipeline whose only component is a U-Net without weights."""
    components = dict.fromkeys(("text_encoder", "text_projection", "movq")) | {"unet": unet()}
    return kind(CONFIG, tokenizer, components, make_mesh(mesh, jax.devices()[:devices]), batch_size)


@contextlib.contextmanager
def without_programs():
    """In place of the compiled programs: zeros of the right kind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BasePipeline, "encode_windows", embeddings)
        patch.setattr(BasePipeline, "encode_arrays", latents)
        patch.setattr(BasePipeline, "decode_arrays", black)
        for module in (text_to_image, image_to_image, inpaint):
            patch.setattr(module, "make_images", images)
        yield


def embeddings(pipe, windows) -> PromptEmbeds:
    count = windows.prompt_of[-1] + 1
    mask = np.ones((count, MAX_TOKENS), bool)
    embeds = np.zeros((count, MAX_TOKENS, CONFIG.text_encoder.d_model), np.float32)
    return PromptEmbeds(embeds, mask, np.full(count, MAX_TOKENS, np.int32))


def latents(pipe, arrays) -> np.ndarray:
    b, h, w, _ = arrays.shape
    return np.zeros((b, h // 8, w // 8, 4), np.float32)


def black(pipe, latents, output_type) -> np.ndarray:
    return np.zeros((len(latents), 8, 8, 3), np.uint8 if output_type == "pil" else np.float32)


def images(pipe, groups, options) -> dict[int, np.ndarray]:
    shape = (1, 1, 4) if options.output_type == "latent" else (8, 8, 3)
    image = np.zeros(shape, np.uint8 if options.output_type == "pil" else np.float32)
    return {int(number): image for group in groups for number in group.index}


def pipelines() -> dict[str, BasePipeline]:
    tokenizer = Tokenizer(CHECKPOINT.path / "tokenizer")
    return {name: pipeline(kind, tokenizer=tokenizer) for name, kind in KINDS.items()}
