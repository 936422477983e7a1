# SPDX-License-Identifier: Apache-2.0
"""Text embeddings -> the context that the U-Net attends to, in either conditioning family.

Two families of Kandinsky 3 weights exist, and differ where a prompt ends (LN(Linear(0)) is the bias
of the LayerNorm, not zero):

- `original` (ai-forever/Kandinsky-3, condition_encoders.py): project, then zero the padding;
  without a negative prompt, one learned null embedding as the only token.
- `diffusers` (pipeline_kandinsky3.py): zero the padding, then project; without a negative prompt,
  zero embeddings, all of them masked.

In both, a prompt of n tokens is seen through a window of L = min(n + 1, 128) rows. Rows at or
beyond L do not exist for the model; rows between n and L are padding, which counts in the pooled
mean.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from k3jax.config import MAX_TOKENS, ConditioningFamily, TextProjectionConfig
from k3jax.model.layers import linear
from k3jax.sharding import axes, constrain


PADDING_BIAS = {"original": -jnp.inf, "diffusers": -10000.0}
"""Added to the scores of padding rows inside the window. The finite one cancels where every row is
padding, as it does for an unconditional input of the diffusers family."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PromptEmbeds:
    """The text encoder's output for prompts; host or device arrays, batch first.

    Attributes:
        embeds: (b, n, d_model), the encoder's output before the projection, n at most 128.
        attention_mask: bool (b, n), true at tokens.
        lengths: int32 (b,), the window L of each prompt.
        token_weights: float32 (b, n), factors of the attention that tokens get; None: 1 each. Below
            1 they also fade into padding, which the pooled mean sees. The embeddings themselves
            cannot carry them, because the LayerNorm takes their length away.
    """

    embeds: jax.Array
    attention_mask: jax.Array
    lengths: jax.Array
    token_weights: jax.Array | None = None

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def __getitem__(self, rows) -> "PromptEmbeds":
        """The prompts at `rows` (a slice or an index array), in that order."""
        return jax.tree.map(lambda x: x[rows], self)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """The projected text that the U-Net attends to.

    Attributes:
        hidden_states: (b, n, cross_attention_dim).
        bias: float32 (b, n), added to attention scores; -inf at rows outside the window.
        lengths: int32 (b,), rows over which the pooled query is the mean.
    """

    hidden_states: jax.Array
    bias: jax.Array
    lengths: jax.Array


def window_length(num_tokens):
    """L of a prompt of `num_tokens` tokens (end-of-sequence included); works on arrays."""
    return jnp.minimum(num_tokens + 1, MAX_TOKENS)


class TextProjection(nnx.Module):
    """Linear (no bias) and LayerNorm (eps 1e-5), and the null embedding of the original family."""

    def __init__(self, config: TextProjectionConfig, *, dtype, param_dtype, rngs):
        width = config.cross_attention_dim
        self.linear = linear(
            config.d_model,
            width,
            ("embed", None),
            use_bias=False,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.norm = nnx.LayerNorm(
            width, epsilon=1e-5, dtype=jnp.float32, param_dtype=param_dtype, rngs=rngs
        )
        self.null_embedding = (
            nnx.Param(jnp.zeros((width,), param_dtype), **axes(None))
            if config.null_embedding
            else None
        )
        self.dtype = dtype

    @jax.named_scope("text_projection")
    def __call__(self, prompt: PromptEmbeds, conditioning: ConditioningFamily) -> Context:
        """The context of prompts (positive or negative)."""
        token = prompt.attention_mask.astype(bool)
        embeds = prompt.embeds.astype(self.dtype)
        if conditioning == "diffusers":
            states = self._project(jnp.where(token[..., None], embeds, 0))
        else:
            states = jnp.where(token[..., None], self._project(embeds), 0)
        bias = _bias(token, prompt.lengths, conditioning)
        if prompt.token_weights is not None:
            bias = jnp.where(token, bias + jnp.log(prompt.token_weights), bias)
            share = jnp.clip(prompt.token_weights, 0, 1).astype(self.dtype)[..., None]
            padding = self._padding(conditioning)
            states = jnp.where(token[..., None], share * states + (1 - share) * padding, states)
        return Context(constrain(states, "batch", None, None), bias, prompt.lengths)

    def unconditional(
        self, lengths: jax.Array, num_rows: int, conditioning: ConditioningFamily
    ) -> Context:
        """The context of no prompt at all, through windows of `lengths` (b,) rows of `num_rows`."""
        shape = (lengths.shape[0], num_rows)
        if conditioning == "diffusers":
            row = self._padding(conditioning)
            states = jnp.broadcast_to(row, (*shape, row.shape[-1]))
            token = jnp.zeros(shape, bool)
        else:
            if self.null_embedding is None:
                raise ValueError(
                    "this checkpoint has no null embedding, which the `original` conditioning "
                    "needs; its config.json should have conditioning: diffusers."
                )
            null = self.null_embedding[...].astype(self.dtype)
            states = jnp.zeros((*shape, null.shape[-1]), self.dtype).at[:, 0].set(null)
            token = jnp.zeros(shape, bool).at[:, 0].set(True)
        states = constrain(states, "batch", None, None)
        return Context(states, _bias(token, lengths, conditioning), lengths)

    def _padding(self, conditioning: ConditioningFamily) -> jax.Array:
        """What a row without a token becomes."""
        if conditioning == "original":
            return jnp.zeros((), self.dtype)
        return self._project(jnp.zeros((self.linear.in_features,), self.dtype))

    def _project(self, embeds):
        return self.norm(self.linear(embeds)).astype(self.dtype)


def _bias(token, lengths, conditioning):
    inside = jnp.arange(token.shape[1]) < lengths[:, None]
    bias = jnp.where(token, 0.0, PADDING_BIAS[conditioning])
    return jnp.where(inside, bias, -jnp.inf).astype(jnp.float32)
