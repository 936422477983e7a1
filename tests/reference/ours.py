# SPDX-License-Identifier: Apache-2.0
"""Our models with the weights of the stored cases, and our pipelines over them."""

import functools

import jax
import numpy as np

from k3jax.config import MAX_TOKENS, ModelConfig, from_dict
from k3jax.model.tokenizer import Tokenizer
from k3jax.sharding import make_mesh

import tiny
from reference import cases


COMPONENTS = ("text_encoder", "text_projection", "unet", "movq")


def last(x):
    """b c h w (also with axes before) -> b h w c."""
    return np.moveaxis(x, -3, -1)


@functools.cache
def config(unet: str = "unet4") -> ModelConfig:
    return from_dict(ModelConfig, cases.model_config(unet))


@functools.cache
def component(name: str, unet: str = "unet4"):
    if name == "text_projection":
        state = {**cases.weights("projection"), **cases.weights("null_embedding")}
    else:
        state = cases.weights(unet if name == "unet" else name)
    return tiny.ours(name, config(unet), state, "original")


class Ids(Tokenizer):
    """The stub tokenizer of the stored pipelines: a prompt is a line of token ids."""

    def __init__(self):
        pass

    def __call__(self, prompts, names=None):
        ids = np.zeros((len(prompts), MAX_TOKENS), np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            tokens = cases.IdTokenizer()(prompt)["input_ids"]
            row[: len(tokens)] = tokens
        return ids, ids != 0


def pipeline(kind, unet: str = "unet4", batch_size: int = 1, model: ModelConfig | None = None):
    """A pipeline of a kind with the tiny models, on one device."""
    mesh = make_mesh(devices=jax.devices()[:1])
    modules = {name: component(name, unet) for name in COMPONENTS}
    return kind(model or config(unet), Ids(), modules, mesh, batch_size=batch_size)
