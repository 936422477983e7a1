# SPDX-License-Identifier: Apache-2.0
"""The attention functions: scores and softmax in float32, memory bounded where tokens are many."""

import functools

import jax
import jax.numpy as jnp


QUERY_CHUNK = 1024
"""Queries whose scores are in memory at once in `chunked_attention`."""
TPU_QUERY_CHUNK = 512
MANY_SCORES = 2**22
"""Of one head, from which on `attention` works in chunks on a TPU: from 2048 tokens."""


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float,
    bias: jax.Array | None = None,
) -> jax.Array:
    """softmax(query key^T scale + bias) value.

    Args:
        query: (b, q, heads, d).
        key, value: (b, k, heads, d).
        scale: factor on the scores.
        bias: added to the scores, broadcastable to (b, heads, q, k), float32. A key at -inf takes
            no part; at least one key of each query must be finite.

    Returns:
        (b, q, heads, d) in the dtype of `value`.
    """
    if bias is not None or query.shape[1] * key.shape[1] < MANY_SCORES:
        return _attention(query, key, value, scale=scale, bias=bias)
    # libtpu 0.0.42 has a form of its own for so many scores, and crashes while it compiles it.
    return jax.lax.platform_dependent(
        query,
        key,
        value,
        tpu=functools.partial(chunked_attention, scale=scale, chunk=TPU_QUERY_CHUNK),
        default=functools.partial(_attention, scale=scale),
    )


def _attention(query, key, value, *, scale, bias=None):
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        scores = scores + bias
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def chunked_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, scale: float, chunk: int = QUERY_CHUNK
) -> jax.Array:
    """`attention` that holds the scores of `chunk` queries at a time, in its gradient too.

    Exact, since the softmax of one query needs no other query. For the autoencoder, whose one head
    attends over every latent pixel: 16,384 at 1024x1024, a gigabyte of scores in one piece.
    """
    b, q, heads, d = query.shape
    if q <= chunk:
        return _attention(query, key, value, scale=scale)
    chunks = -(-q // chunk)
    padded = jnp.pad(query, ((0, 0), (0, chunks * chunk - q), (0, 0), (0, 0)))
    padded = padded.reshape(b, chunks, chunk, heads, d).swapaxes(0, 1)

    @jax.checkpoint
    def one(part):
        return _attention(part, key, value, scale=scale)

    out = jax.lax.map(one, padded)
    return out.swapaxes(0, 1).reshape(b, chunks * chunk, heads, d)[:, :q]
