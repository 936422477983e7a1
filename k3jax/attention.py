# SPDX-License-Identifier: Apache-2.0
"""The attention functions: scores and softmax in float32, memory bounded where tokens are many."""

import jax
import jax.numpy as jnp


QUERY_CHUNK = 1024
"""Queries whose scores are in memory at once in `chunked_attention`."""


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
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        scores = scores + bias
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def chunked_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, scale: float
) -> jax.Array:
    """`attention` that holds the scores of QUERY_CHUNK queries at a time.

    Exact, since the softmax of one query needs no other query. For the autoencoder, whose one head
    attends over every latent pixel: 16,384 at 1024x1024, a gigabyte of scores in one piece.
    """
    b, q, heads, d = query.shape
    if q <= QUERY_CHUNK:
        return attention(query, key, value, scale=scale)
    chunks = -(-q // QUERY_CHUNK)
    padded = jnp.pad(query, ((0, 0), (0, chunks * QUERY_CHUNK - q), (0, 0), (0, 0)))
    padded = padded.reshape(b, chunks, QUERY_CHUNK, heads, d).swapaxes(0, 1)
    out = jax.lax.map(lambda part: attention(part, key, value, scale=scale), padded)
    return out.swapaxes(0, 1).reshape(b, chunks * QUERY_CHUNK, heads, d)[:, :q]
