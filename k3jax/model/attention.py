# SPDX-License-Identifier: Apache-2.0
"""Attention, in the form that suits the platform and the shape.

| scores of a head | form |
|---|---|
| few (text, cross-attention at low resolution) | einsum, softmax, einsum: XLA fuses them |
| many, on a TPU | one kernel (k3jax/model/tpu_attention.py) |
| many, on a GPU in half precision | cuDNN |
| many, elsewhere | the first form for some queries at a time |

All are exact: scores and softmax in float32, shifted by the true maximum of each row. Every layer
with attention has a switch, `attention_form`: "xla" turns the kernels off, "kernel" refuses what
they do not take, "auto" is the table.

On a mesh each device attends for its own images (`data`, `fsdp`) and heads (`tensor`). Where
`tensor` does not divide the heads (6 over 4), it splits the queries' tokens instead, and each
device has the keys and values of all heads; where it divides neither, every device along it
computes all of them.
"""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from k3jax.config import AttentionForm
from k3jax.sharding import BATCH, data_parallelism, traced_mesh


QUERY_CHUNK = 1024
"""Queries whose scores are in memory at once in `chunked_attention`."""
MANY_SCORES = 2**17
"""Of one head: 1024 pixels over 128 words are many, 256 pixels over each other are few."""
CUDNN_HEAD_DIM = 128
"""The widest head that cuDNN's kernels take."""


class AttentionLayer(nnx.Module):
    """Base class of the layers that call `attention`: holds the switch between its forms."""

    attention_form: AttentionForm = "auto"


def set_attention_form(module: nnx.Module, form: AttentionForm) -> None:
    """Sets the switch of all attention layers of a module."""
    for _, layer in nnx.iter_modules(module):
        if isinstance(layer, AttentionLayer):
            layer.attention_form = form


def check_attention_form(form: AttentionForm, platform: str, dtype) -> None:
    """Refuses unknown forms, and "kernel" where no kernel exists.

    Args:
        platform: of the devices, as JAX calls it.
        dtype: of the computation.

    Raises:
        ValueError: one sentence with the alternatives.
    """
    if form not in get_args(AttentionForm):
        raise ValueError(f"attention is {form!r}; it must be one of {get_args(AttentionForm)}.")
    half = jnp.dtype(dtype).itemsize == 2
    if form == "kernel" and not (platform == "tpu" or (platform == "gpu" and half)):
        raise ValueError(
            f"attention is 'kernel', but there is none for {jnp.dtype(dtype)} on {platform}: TPUs "
            "have one, and GPUs one for bfloat16; use 'auto' or 'xla'."
        )


@jax.named_scope("attention")
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float,
    bias: jax.Array | None = None,
    form: AttentionForm = "auto",
) -> jax.Array:
    """softmax(query key^T scale + bias) value.

    Args:
        query: (b, q, heads, d).
        key, value: (b, k, heads, d).
        scale: factor on the scores.
        bias: added to the scores, broadcastable to (b, heads, q, k), float32. A key at -inf takes
            no part; at least one key of each query must be finite.
        form: see the table above.

    Returns:
        (b, q, heads, d) in the dtype of `value`.

    Raises:
        ValueError: the form is "kernel", and the heads do not fit any.
    """
    local = functools.partial(_local_attention, scale=scale, form=form)
    mesh = traced_mesh()
    if mesh is None:
        return local(query, key, value, bias)
    queries, keys, biases = _layout(query, bias, mesh)
    return jax.shard_map(
        local, in_specs=(queries, keys, keys, biases), out_specs=queries, check_vma=False
    )(query, key, value, bias)


def token_axis(heads: int) -> str | None:
    """What the mesh's `tensor` axis splits where it does not divide `heads`: the queries' tokens.

    None where it splits the heads. Activations that become queries are best constrained to it
    before their projections (`k3jax.sharding.constrain`).
    """
    mesh = traced_mesh()
    return None if mesh is None or heads % mesh.shape["tensor"] == 0 else "tokens"


def _layout(query, bias, mesh) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec | None]:
    """How queries (and results), keys and values, and a bias are split over a mesh."""
    b, tokens, heads, _ = query.shape
    tensor = mesh.shape["tensor"]
    batch = None if b % data_parallelism(mesh) else BATCH
    by_head = "tensor" if heads % tensor == 0 else None
    by_token = "tensor" if not by_head and tokens % tensor == 0 else None
    queries = PartitionSpec(batch, by_token, by_head)
    keys = PartitionSpec(batch, None, by_head)
    if bias is None:
        return queries, keys, None
    split = zip(bias.shape, (batch, by_head, by_token, None), strict=True)
    return queries, keys, PartitionSpec(*(None if size == 1 else axis for size, axis in split))


def _local_attention(query, key, value, bias, *, scale, form):
    """Attention on one device."""
    few = query.shape[1] * key.shape[1] < MANY_SCORES
    if few or (bias is not None and bias.shape[1:3] != (1, 1)):
        return plain_attention(query, key, value, bias, scale=scale)
    if form != "xla" and bias is None and _cudnn_takes(query):
        return jax.nn.dot_product_attention(
            query, key, value, scale=scale, implementation="cudnn"
        ).astype(value.dtype)
    if bias is not None:  # one row for each image, as these forms take it
        bias = jnp.broadcast_to(bias, (query.shape[0], 1, 1, key.shape[1]))
    chunked = functools.partial(chunked_attention, scale=scale)
    kernel = None if form == "xla" else _tpu_kernel(query, scale=scale)
    if kernel is None and form == "kernel":
        raise ValueError(
            f"attention is 'kernel', but no kernel takes {query.shape[1]} queries with heads of "
            f"{query.shape[3]} channels: use 'auto' or 'xla'."
        )
    if kernel is None:
        return chunked(query, key, value, bias)
    return jax.lax.platform_dependent(query, key, value, bias, tpu=kernel, default=chunked)


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


def _tpu_kernel(query: jax.Array, *, scale: float):
    """The TPU kernel for queries like these, with derivatives, or None if it does not take them."""
    # Pallas takes long to import, and only large images need it.
    from k3jax.model import tpu_attention

    _, tokens, heads, d = query.shape
    if not tpu_attention.fits(tokens, d):
        return None

    @jax.custom_jvp
    def kernel(query, key, value, bias):
        flat = [x.reshape(*x.shape[:2], -1) for x in (query, key, value)]
        bias = None if bias is None else bias[:, 0, 0]
        out = tpu_attention.tpu_attention(*flat, bias, heads=heads, scale=scale)
        return out.reshape(query.shape)

    @kernel.defjvp
    def _derivative(primals, tangents):
        chunked = functools.partial(chunked_attention, scale=scale)
        return kernel(*primals), jax.jvp(chunked, primals, tangents)[1]

    return kernel
