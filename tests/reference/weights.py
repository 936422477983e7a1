# SPDX-License-Identifier: Apache-2.0
"""Weights and noise as pure functions of (name, shape, seed), so that no file has to hold them.

The stored outputs of the original code are only valid for exactly these numbers. They come from
numpy's legacy RandomState because its stream is frozen for ever, which newer generators do not
promise. Names are those of the original PyTorch code.
"""

import math
import re
import zlib
from collections.abc import Mapping

import numpy as np


ALIASES = {"encoder.embed_tokens.weight": "shared.weight"}
"""Names of one and the same tensor; all get the values of the name on the right."""

# (pattern of the full name, mean, standard deviation; None: 1 / sqrt(fan-in) times the gain).
# The first match counts. Gains keep activations and the predicted noise near unit scale;
# context_mlp is zero in a fresh original network, which would hide the time conditioning.
RULES = (
    (r"null_embedding", 0.0, 1.0, None),
    (r"shared\.weight", 0.0, 1.0, None),
    (r".*relative_attention_bias\.weight", 0.0, 0.5, None),
    (r".*quantize\.embedding\.weight", 0.0, 1.0, None),
    (r"1\.bias", 0.0, 0.5, None),  # LayerNorm of the text projection
    (r".*conv_y\.bias", 1.0, 0.1, None),
    (r".*bias", 0.0, 0.1, None),
    (r".*context_mlp\.1\.weight", 0.0, None, 0.5),
    (r".*SelfAttention\.q\.weight", 0.0, None, 0.5),
    (r"to_time_embed\.1\.weight", 0.0, None, 0.5),  # rounding of sin and cos at t = 999
    (r".*conv_[yb]\.weight", 0.0, None, 0.03),  # Flash ends with latents of scale 45
    (r"decoder\.conv_out\.weight", 0.0, None, 0.6),
    (r"out_layer\.2\.weight", 0.0, None, 1.6),
    (r".*", 0.0, None, 1.0),
)


def normal(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Standard normal float32 numbers that depend on nothing but the arguments."""
    state = np.random.RandomState([seed, zlib.crc32(name.encode())])
    return state.standard_normal(shape).astype(np.float32)


def fill(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Deterministic float32 weights for tensors with the original's names and shapes."""
    return {name: _tensor(ALIASES.get(name, name), tuple(s), seed) for name, s in shapes.items()}


def checksum(weights: Mapping[str, np.ndarray]) -> float:
    """Mean absolute value of the tensors' means: notices any change of the numbers above."""
    return float(np.mean([np.abs(w.astype(np.float64)).mean() for w in weights.values()]))


def randomise_(module, seed: int):
    """Loads `fill`'s weights into a torch module, by the names of its state dict; returns it."""
    import torch

    state = module.state_dict()
    weights = fill({name: tuple(t.shape) for name, t in state.items()}, seed)
    module.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()})
    return module.eval()


def _tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    unit = normal(name, shape, seed)
    if len(shape) == 1 and name.endswith("weight"):  # scale of a norm
        return np.float32(1.0) + np.float32(0.1) * unit
    mean, std, gain = next(rule[1:] for rule in RULES if re.fullmatch(rule[0], name))
    if std is None:
        # A 2x2 transposed convolution of stride 2 is (in, out, 2, 2) and sums over `in` alone.
        fan_in = shape[0] if "up_sample." in name else math.prod(shape[1:])
        std = gain / math.sqrt(fan_in)
    return np.float32(mean) + np.float32(std) * unit
