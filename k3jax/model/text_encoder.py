# SPDX-License-Identifier: Apache-2.0
"""Flan-UL2's encoder: token ids -> text embeddings.

A T5 1.1 encoder (arXiv:1910.10683) with gated SiLU. The layers are identical, so they are one
module with stacked weights under `jax.lax.scan`; the relative position bias, which PyTorch keeps in
block 0, belongs to the encoder. Source: transformers, models/t5/modeling_t5.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from k3jax.config import TextEncoderConfig
from k3jax.model.attention import AttentionLayer, attention, token_axis
from k3jax.model.layers import NO_INIT, RMSNorm, linear
from k3jax.sharding import axes, constrain, gathered


class Embed(nnx.Embed):
    def __call__(self, ids: jax.Array) -> jax.Array:
        """int (b, n) -> (b, n, features)."""
        x = jnp.take(gathered(self.embedding), ids, axis=0).astype(self.dtype)
        return constrain(x, "batch", None, None)


class SelfAttention(AttentionLayer):
    """T5 self-attention: no biases, no scaling of the scores."""

    def __init__(self, config: TextEncoderConfig, *, dtype, param_dtype, rngs):
        inner = config.num_heads * config.d_kv
        new_linear = functools.partial(
            linear,
            heads=config.num_heads,
            use_bias=False,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.q = new_linear(config.d_model, inner, ("embed", "heads"))
        self.k = new_linear(config.d_model, inner, ("embed", "heads"))
        self.v = new_linear(config.d_model, inner, ("embed", "heads"))
        self.o = new_linear(inner, config.d_model, ("heads", "embed"))
        self.num_heads = config.num_heads

    @jax.named_scope("self_attention")
    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        x = constrain(x, "batch", token_axis(self.num_heads), None)
        q, k, v = (
            rearrange(project(x), "b n (h d) -> b n h d", h=self.num_heads)
            for project in (self.q, self.k, self.v)
        )
        out = attention(q, k, v, scale=1.0, bias=bias, form=self.attention_form)
        return self.o(rearrange(out, "b n h d -> b n (h d)"))


class GatedMLP(nnx.Module):
    """wo(silu(wi_0(x)) * wi_1(x)), arXiv:2002.05202."""

    def __init__(self, config: TextEncoderConfig, *, dtype, param_dtype, rngs):
        new_linear = functools.partial(
            linear, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.wi_0 = new_linear(config.d_model, config.d_ff, ("embed", "mlp"))
        self.wi_1 = new_linear(config.d_model, config.d_ff, ("embed", "mlp"))
        self.wo = new_linear(config.d_ff, config.d_model, ("mlp", "embed"))

    @jax.named_scope("mlp")
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.wo(jax.nn.silu(self.wi_0(x)) * self.wi_1(x))


class EncoderLayer(nnx.Module):
    """One pre-norm layer on a float32 residual stream.

    In half precision T5's residual stream overflows or loses the small terms, so it stays float32
    (as it does in transformers, which keeps `wo` in float32); the matmuls run in `dtype`.
    """

    def __init__(self, config: TextEncoderConfig, *, dtype, param_dtype, rngs):
        norm = functools.partial(
            RMSNorm, config.d_model, config.layer_norm_epsilon, dtype=dtype, param_dtype=param_dtype
        )
        self.attention_norm = norm()
        self.attention = SelfAttention(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.mlp_norm = norm()
        self.mlp = GatedMLP(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    @jax.named_scope("layer")
    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """float32 (b, n, d) -> float32 (b, n, d)."""
        x = x + self.attention(self.attention_norm(x), bias).astype(jnp.float32)
        x = constrain(x, "batch", None, None)
        x = x + self.mlp(self.mlp_norm(x)).astype(jnp.float32)
        return constrain(x, "batch", None, None)


class TextEncoder(nnx.Module):
    def __init__(self, config: TextEncoderConfig, *, dtype, param_dtype, rngs):
        self.config, self.dtype = config, dtype
        self.embed_tokens = Embed(
            config.vocab_size,
            config.d_model,
            embedding_init=NO_INIT,
            embedding_metadata=axes("vocab", "embed"),
            dtype=jnp.float32,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.relative_attention_bias = nnx.Embed(
            config.relative_attention_num_buckets,
            config.num_heads,
            embedding_init=NO_INIT,
            embedding_metadata=axes(None, None),
            dtype=jnp.float32,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.layers = nnx.vmap(
            lambda key: EncoderLayer(
                config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(params=key)
            ),
            transform_metadata={nnx.PARTITION_NAME: "layers"},
        )(jax.random.split(rngs.params(), config.num_layers))
        self.final_norm = RMSNorm(
            config.d_model, config.layer_norm_epsilon, dtype=dtype, param_dtype=param_dtype
        )

    @jax.named_scope("text_encoder")
    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        """Embeds tokens.

        Args:
            input_ids: int (b, n).
            attention_mask: (b, n), true (1) at tokens, false (0) at padding.

        Returns:
            (b, n, d_model) in the compute dtype. Rows of padding are meaningless; rows of tokens do
            not depend on the padding.
        """
        bias = self.bias(attention_mask)
        return self.final_norm(through_layers(self.layers, self.embed_tokens(input_ids), bias))

    def bias(self, attention_mask: jax.Array) -> jax.Array:
        """What is added to the scores of every layer, float32 (b, heads, n, n)."""
        mask = jnp.where(attention_mask.astype(bool)[:, None, None, :], 0.0, -jnp.inf)
        return self.position_bias(attention_mask.shape[1]) + mask

    def position_bias(self, length: int) -> jax.Array:
        """Learned bias by relative position, float32 (1, heads, length, length)."""
        buckets = relative_position_buckets(
            length,
            self.config.relative_attention_num_buckets,
            self.config.relative_attention_max_distance,
        )
        return rearrange(self.relative_attention_bias(jnp.asarray(buckets)), "q k h -> 1 h q k")


def through_layers(layers: EncoderLayer, x: jax.Array, bias: jax.Array) -> jax.Array:
    """float32 (b, n, d) through layers whose weights are stacked."""
    x, _ = jax.lax.scan(lambda x, layer: (layer(x, bias), None), x, layers)
    return x


def relative_position_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of (key - query) for every pair of positions, int32 (length, length).

    Half of the buckets are for keys after the query. In each half the first half counts single
    positions and the rest grows by powers up to `max_distance`. float32 with the operations in
    PyTorch's order: the truncation falls on the same side at the edges.
    """
    relative = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(relative)
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + ratio.astype(np.int32), half - 1)
    return np.where(relative > 0, half, 0) + np.where(distance < exact, distance, far)
