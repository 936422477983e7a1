# SPDX-License-Identifier: Apache-2.0
"""Conditioning: all inputs of the U-Net other than noisy latents and time, as one pytree.

A new kind of conditioning (tokens of an image, residuals of a control network) is a new field of
`Conditioning`, a line in `Conditioning.pairs`, and the layers of the U-Net that read it.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from k3jax.model.context import Context
from k3jax.sharding import constrain


KeysValues = tuple[jax.Array, jax.Array]
"""Keys and values of one attention layer, heads side by side: (b, m, channels) each."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ContextCache:
    """What the U-Net computes from a context alone, once per image; see `UNet.context_cache`.

    Attributes:
        pooled: float32 (b, time_embedding_dim), added to the time embedding.
        bias: float32 (b, m), added to the scores of each key.
        down, up: keys and values of each level's cross-attentions, or None for a level without.
    """

    pooled: jax.Array
    bias: jax.Array
    down: list[list[KeysValues] | None]
    up: list[list[KeysValues] | None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Conditioning:
    """The U-Net's inputs other than latents and time; None for those that a call does not have.

    Attributes:
        context: of the prompts. In a loop give the cache, so that it is computed once.
        unconditional: of the negative prompts or of no prompt, for classifier-free guidance.
        guidance_scale: w of each sample, float32 (b,).
        extra_channels: (b, h, w, c), appended to the latents' channels (inpainting: the mask and
            the latents of the masked image).
    """

    context: Context | ContextCache | None = None
    unconditional: Context | ContextCache | None = None
    guidance_scale: jax.Array | None = None
    extra_channels: jax.Array | None = None

    def pairs(self) -> "Conditioning":
        """Conditioning of 2 b samples: each sample with its context, then without it."""
        extra = self.extra_channels
        return Conditioning(
            context=jax.tree.map(interleave, self.context, self.unconditional),
            extra_channels=None if extra is None else interleave(extra, extra),
        )


def as_conditioning(value: Conditioning | Context | ContextCache | None) -> Conditioning:
    """A context alone as conditioning with nothing else."""
    return value if isinstance(value, Conditioning) else Conditioning(context=value)


def interleave(*arrays: jax.Array) -> jax.Array:
    """Rows a0 b0 a1 b1 ...: each device of a split batch keeps its own samples."""
    rows = jnp.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])
    return constrain(rows, "batch", ...)
