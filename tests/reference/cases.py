# SPDX-License-Identifier: Apache-2.0
"""The tiny models behind the stored outputs of the original code, and the loader of them.

Arrays are in the original's layout: b c h w. `load` gives everything a test needs: stored inputs
and outputs, and the injected noise, which is drawn again from its seed.
"""

import json
from pathlib import Path

import numpy as np

from .weights import fill, normal


FOLDER = Path(__file__).parent
SEED = 7
MAX_TOKENS = 128
PAD, EOS = 0, 1

UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "init_channels": 16,
    "block_out_channels": (32, 64, 64, 128),
    "layers_per_block": 2,
    "time_embedding_dim": 64,
    "cross_attention_dim": 48,
    "attention_head_dim": 8,
    "groups": 8,
}
UNETS = {
    "unet4": UNET,
    "unet9": UNET | {"in_channels": 9},
    "unet_two_levels": UNET | {"block_out_channels": (32, 64)},
    "unet_no_cross": UNET | {"add_cross_attention": (False, False, False, False)},
}
"""Keyword arguments of k3jax.config.UNetConfig, by component name."""

TEXT_ENCODER = {
    "vocab_size": 256,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
}
TEXT_PROJECTION = {"d_model": 32, "cross_attention_dim": 48, "null_embedding": True}
MOVQ = {"block_out_channels": (32, 64, 64, 128), "layers_per_block": 2}


def model_config(unet: str = "unet4") -> dict:
    """Nested settings of the whole tiny model, for k3jax.config.from_dict(ModelConfig, ...)."""
    return {
        "text_encoder": TEXT_ENCODER,
        "text_projection": TEXT_PROJECTION,
        "unet": UNETS[unet],
        "movq": MOVQ,
        "conditioning": "original",
    }


def weights(component: str) -> dict[str, np.ndarray]:
    """The weights of a component under the original's names.

    Components: the keys of UNETS, "text_encoder" (names of transformers' T5EncoderModel),
    "projection" (names of projection.pt), "null_embedding" and "movq".
    """
    return fill(load("original_shapes")["meta"]["shapes"][component], SEED)


def noise(case: str, steps: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The starting noise `shape` and the noise of every step (steps, *shape) of a stored case."""
    start = normal(f"{case}.start", tuple(shape), SEED)
    each = [normal(f"{case}.step.{i}", tuple(shape), SEED) for i in range(steps)]
    return start, np.stack(each)


def load(name: str) -> dict:
    """One stored file as a dict of arrays, with "meta" parsed from its JSON.

    A pipeline file also gets "x_T" (b, 4, h, w) and "step_noise" (steps, b, 4, h, w); its images
    are stored in 16 bits and come back as float32 in [0, 1].
    """
    with np.load(FOLDER / f"{name}.npz") as file:
        out = {key: file[key] for key in file.files}
    out["meta"] = meta = json.loads(str(out["meta"]))
    if "images" in out:
        out["images"] = out["images"].astype(np.float32) / np.float32(65535)
        out["x_T"], out["step_noise"] = noise(meta["case"], meta["steps"], meta["latent_shape"])
    return out


def analytic_eps(xp, x, t, context, mask, channel_axis: int = 1):
    """A closed formula in the place of the U-Net, so that samplers are compared and nothing else.

    Args:
        xp: numpy, jax.numpy or torch; the formula uses only what all three have.
        x: latents, 4-D, channels on `channel_axis`. t: float times (b,).
        context: (b, tokens, width). mask: bool (b, tokens).
    """
    seen = mask[..., None]
    mean = (context * seen).sum(1) / seen.sum(1)
    text = xp.tanh(mean).mean(1).reshape((-1, 1, 1, 1))
    angle = xp.cos(t / 700).reshape((-1, 1, 1, 1))
    return 0.7 * x * angle + 0.3 * text + 0.2 * xp.sin(2 * xp.flip(x, (channel_axis,)))


def token_text(ids) -> str:
    """Writes token ids (without the end-of-sequence) as the "prompt" that IdTokenizer reads."""
    return " ".join(str(i) for i in ids)


class IdTokenizer:
    """Stands in for the T5 tokenizer: a prompt is a line of token ids."""

    pad_token_id = PAD
    eos_token_id = EOS

    def __call__(self, text: str, max_length: int = MAX_TOKENS, truncation: bool = True) -> dict:
        ids = [int(word) for word in text.split()]
        if truncation:
            ids = ids[: max_length - 1]
        ids.append(self.eos_token_id)
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}
