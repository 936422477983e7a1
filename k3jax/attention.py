# SPDX-License-Identifier: Apache-2.0
"""Attention, in the form that suits the platform and the shape.

| scores of a head | form |
|---|---|
| few (text, cross-attention at low resolution) | einsum, softmax, einsum: XLA fuses them |
| many, on a TPU | one kernel (k3jax/tpu_attention.py), on each device of the mesh by itself |
| many, on a GPU in half precision | cuDNN |
| many, elsewhere | the first form for some queries at a time |

All are exact: scores and softmax in float32, shifted by the true maximum of each row.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from k3jax.sharding import BATCH, MESH_AXES


QUERY_CHUNK = 1024
"""Queries whose scores are in memory at once in `chunked_attention`."""
MANY_SCORES = 2**17
"""Of one head: 1024 pixels over 128 words are many, 256 pixels over each other are few."""
CUDNN_HEAD_DIM = 128
"""The widest head that cuDNN's kernels take."""


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
    few = query.shape[1] * key.shape[1] < MANY_SCORES
    if few or (bias is not None and bias.shape[1:3] != (1, 1)):
        return plain_attention(query, key, value, bias, scale=scale)
    if bias is None and _cudnn_takes(query):
        return jax.nn.dot_product_attention(
            query, key, value, scale=scale, implementation="cudnn"
        ).astype(value.dtype)
    if bias is not None:  # one row for each image, as these forms take it
        bias = jnp.broadcast_to(bias, (query.shape[0], 1, 1, key.shape[1]))
    elsewhere = functools.partial(chunked_attention, scale=scale)
    return jax.lax.platform_dependent(
        query,
        key,
        value,
        bias,
        tpu=_kernel_on_mesh(query, scale=scale) or elsewhere,
        default=elsewhere,
    )


def plain_attention(query, key, value, bias=None, *, scale):
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        scores = scores + bias
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def chunked_attention(query, key, value, bias=None, *, scale, chunk=QUERY_CHUNK):
    """`plain_attention` with the scores of `chunk` queries in memory, in its gradient too.

    Exact, since the softmax of one query needs no other query. `bias`: (b, 1, 1, k).
    """
    b, q, heads, d = query.shape
    if q <= chunk:
        return plain_attention(query, key, value, bias, scale=scale)
    chunks = -(-q // chunk)
    padded = jnp.pad(query, ((0, 0), (0, chunks * chunk - q), (0, 0), (0, 0)))
    padded = padded.reshape(b, chunks, chunk, heads, d).swapaxes(0, 1)

    @jax.checkpoint
    def one(part):
        return plain_attention(part, key, value, bias, scale=scale)

    out = jax.lax.map(one, padded)
    return out.swapaxes(0, 1).reshape(b, chunks * chunk, heads, d)[:, :q]


def _cudnn_takes(query: jax.Array) -> bool:
    # Asked of the process, since JAX looks for cuDNN while it traces.
    return (
        jax.default_backend() == "gpu"
        and query.dtype in (jnp.bfloat16, jnp.float16)
        and query.shape[-1] <= CUDNN_HEAD_DIM
    )


def _kernel_on_mesh(query: jax.Array, *, scale: float):
    """The TPU kernel over the mesh that is set (`k3jax.sharding.on_mesh`), or None if it cannot be.

    XLA does not know how to split a kernel, so each device is given its own images and heads.
    """
    from k3jax import tpu_attention  # Pallas takes long to import, and only large images need it.

    b, tokens, heads, d = query.shape
    mesh = jax.sharding.get_abstract_mesh()
    if not set(MESH_AXES) <= set(mesh.axis_names):
        return None
    alone = bool(mesh.manual_axes)  # of a program that is split by hand already
    images = 1 if alone else mesh.shape["data"] * mesh.shape["fsdp"]
    tensor = 1 if alone or heads % mesh.shape["tensor"] else mesh.shape["tensor"]
    if b % images or not tpu_attention.fits(tokens, d):
        return None

    @jax.custom_vjp
    def kernel(query, key, value, bias):
        flat = [x.reshape(*x.shape[:2], -1) for x in (query, key, value)]
        out = tpu_attention.tpu_attention(
            *flat,
            None if bias is None else bias[:, 0, 0],
            heads=heads // tensor,
            scale=scale,
        )
        return out.reshape(query.shape)

    def backward(saved, gradient):
        return jax.vjp(functools.partial(chunked_attention, scale=scale), *saved)[1](gradient)

    kernel.defvjp(lambda *args: (kernel(*args), args), backward)
    if alone or mesh.size == 1:
        return kernel
    split = PartitionSpec(BATCH, None, "tensor" if tensor > 1 else None)
    in_specs = (split, split, split, PartitionSpec(BATCH))
    return jax.shard_map(kernel, in_specs=in_specs, out_specs=split, check_vma=False)
