# SPDX-License-Identifier: Apache-2.0
"""Attention as one kernel of a TPU: scores never leave the chip's vector memory.

Exact for any scores: the softmax is shifted by the true maximum of each row, and where the keys do
not fit in one block, it is put together block by block as in FlashAttention (arXiv:2205.14135).

Heads stay where the projections leave them, side by side in the channels. A block is 128 channels
wide, as the matrix unit is, so it holds two heads of 64: what belongs to the other head is zero in
the queries and is not taken from the result. That costs no time (the unit would be half empty) and
saves the transpositions to one head after another, which take longer than the arithmetic.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


LANES = 128
"""Width of a vector register and of the matrix unit."""
SUBLANES = 16
"""Rows of a tile of bfloat16."""
QUERY_BLOCKS = (512, 256, 128)
KEY_BLOCK = 2048
"""Keys of a block, where not all fit."""
BUDGET = 17 * 2**20
"""Bytes for scores, keys and values of a block."""
VMEM_LIMIT = 28 * 2**20
"""Of all that the kernel keeps; chips have 32 MiB of vector memory (v4) to 128 (v5e, v6e)."""
SCORE_BYTES = 6
"""A score and its exponential: float32 and bfloat16."""


def fits(query_tokens: int, head_dim: int) -> bool:
    """Whether `tpu_attention` takes these sizes (on one device)."""
    whole = head_dim % LANES == 0 or LANES % head_dim == 0
    return whole and query_tokens >= SUBLANES


@functools.partial(jax.jit, static_argnames=("heads", "scale", "interpret"))
def tpu_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    *,
    heads: int,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """softmax(query key^T scale + bias) value of each head.

    Args:
        query: (b, q, heads d).
        key, value: (b, k, heads d).
        bias: float32 (b, k), added to the scores of each key; -inf takes it out.
        interpret: runs the kernel step by step as JAX operations, on any platform.

    Returns:
        (b, q, heads d), in the dtype of `value`.
    """
    b, queries, channels = query.shape
    keys, head_dim = key.shape[1], channels // heads
    lanes = max(head_dim, LANES)
    block_q, block_k = _blocks(queries, keys, lanes)
    steps = pl.cdiv(keys, block_k)
    if channels % lanes:  # heads that do not fill their last block
        wide = ((0, 0), (0, 0), (0, -channels % lanes))
        filled = (jnp.pad(x, wide) for x in (query, key, value))
        heads += -channels % lanes // head_dim
        return tpu_attention(*filled, bias, heads=heads, scale=scale, interpret=interpret)[
            ..., :channels
        ]
    if bias is None and keys % block_k:
        bias = jnp.zeros((b, keys), jnp.float32)
    if keys % block_k:  # Memory after the last key is undefined: pad with zeros.
        rest = steps * block_k - keys
        key, value = (jnp.pad(x, ((0, 0), (0, rest), (0, 0))) for x in (key, value))
        bias = jnp.pad(bias, ((0, 0), (0, rest)), constant_values=-jnp.inf)

    per_query = pl.BlockSpec((1, block_q, lanes), lambda b, c, q, k: (b, q, c))
    per_key = pl.BlockSpec((1, block_k, lanes), lambda b, c, q, k: (b, k, c))
    per_bias = pl.BlockSpec((1, 1, block_k), lambda b, c, q, k: (b, 0, k))
    row = pltpu.VMEM((lanes // head_dim, block_q, LANES), jnp.float32)
    return pl.pallas_call(
        functools.partial(_kernel, scale=scale, head_dim=head_dim, steps=steps),
        grid=(b, channels // lanes, pl.cdiv(queries, block_q), steps),
        in_specs=[per_query, per_key, per_key] + [per_bias] * (bias is not None),
        out_specs=per_query,
        out_shape=jax.ShapeDtypeStruct(query.shape, value.dtype),
        scratch_shapes=[row, row, pltpu.VMEM((block_q, lanes), jnp.float32)] if steps > 1 else [],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * b * queries * keys * channels,
            transcendentals=b * queries * keys * heads,
            bytes_accessed=2 * (2 * query.size + 2 * key.size),
        ),
        interpret=interpret,
        name="attention",
    )(query, key, value, *([bias[:, None]] if bias is not None else []))


def _blocks(queries: int, keys: int, lanes: int) -> tuple[int, int]:
    """Queries and keys of a block: all keys if they fit with some block of queries."""

    def size(q, k):
        buffers = 2 * 2 * 2 * k * lanes  # keys and values, bfloat16, the next ones on their way
        return SCORE_BYTES * q * k + buffers

    for block_k in (keys, KEY_BLOCK, KEY_BLOCK // 2, KEY_BLOCK // 4):
        for block_q in QUERY_BLOCKS:
            if block_k <= keys and size(block_q, block_k) <= BUDGET:
                return min(block_q, queries), block_k
    raise ValueError(f"heads of {lanes} channels do not fit a TPU's vector memory.")


def _kernel(query_ref, key_ref, value_ref, *refs, scale, head_dim, steps):
    biased = len(refs) == (2 if steps == 1 else 5)
    bias = refs[0][0] if biased else None
    out_ref, *scratch = refs[biased:]
    query, key, value = query_ref[0], key_ref[0], value_ref[0]
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, query.shape[1]), 1)
    step = pl.program_id(3)
    result = jnp.zeros(query.shape, jnp.float32)
    for head in range(query.shape[1] // head_dim):
        own = (lane >= head * head_dim) & (lane < (head + 1) * head_dim)
        scores = _product(jnp.where(own, query, 0).astype(query.dtype), key, 1)
        # Without a bias the scale is applied to differences: one pass over the scores less.
        scores, factor = (scores, scale) if bias is None else (scores * scale + bias, 1.0)
        maximum = scores.max(-1, keepdims=True)
        if steps > 1:
            maximum_ref, sum_ref, total_ref = scratch
            before = jnp.where(step == 0, -jnp.inf, maximum_ref[head][:, :1])
            maximum = jnp.maximum(maximum, before)
            # A block may hold no key that takes part.
            shift = jnp.where(maximum == -jnp.inf, 0, maximum)
        else:
            shift = maximum
        weights = jnp.exp((scores - shift) * factor)
        total = weights.sum(-1, keepdims=True)
        out = _product(weights.astype(value.dtype), value, 0)
        if steps > 1:
            kept = jnp.exp((before - shift) * factor)
            total = total + jnp.where(step == 0, 0, kept * sum_ref[head][:, :1])
            out = out + jnp.where(step == 0, 0, kept * total_ref[...])
            maximum_ref[head] = jnp.broadcast_to(maximum, maximum_ref.shape[1:])
            sum_ref[head] = jnp.broadcast_to(total, sum_ref.shape[1:])
            result = jnp.where(own, out, result)
        else:
            result = jnp.where(own, out / total, result)
    if steps == 1:
        out_ref[0] = result.astype(out_ref.dtype)
        return
    total_ref[...] = result

    @pl.when(step == steps - 1)
    def _finish():
        sums = jnp.zeros(result.shape, jnp.float32)
        for head in range(result.shape[1] // head_dim):
            own = (lane >= head * head_dim) & (lane < (head + 1) * head_dim)
            sums = jnp.where(own, sum_ref[head][:, :1], sums)
        out_ref[0] = (result / sums).astype(out_ref.dtype)


def _product(a, b, b_axis):
    """a (m, x) with axis `b_axis` of b, summed in float32."""
    # float32 operands (tests) are multiplied in float32; bfloat16 ones have nothing to lose.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((1,), (b_axis,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
