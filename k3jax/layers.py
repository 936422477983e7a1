# SPDX-License-Identifier: Apache-2.0
"""The layers all three networks are made of: linear, convolution, resampling and norms.

Activations are b h w c (batch, height, width, channels) everywhere. Statistics of norms are float32
whatever the compute dtype.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from k3jax.sharding import axes


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dense(x: jax.Array, kernel: jax.Array, precision: jax.lax.Precision | None = None) -> jax.Array:
    """(..., in) @ (in, out) -> (..., out), with a gradient that XLA:CPU computes twice as fast.

    For the kernel's gradient XLA transposes x, and fuses into that transposition whatever made x:
    a strided loop with exponentials in it. Held apart, both are quick.
    """
    return jnp.matmul(x, kernel, precision=precision)


def _dense_forward(x, kernel, precision):
    return dense(x, kernel, precision), (x, kernel)


def _dense_backward(precision, residuals, gradient):
    x, kernel = residuals
    x, gradient = jax.lax.platform_dependent(
        x, gradient, cpu=_held_apart, default=lambda *arrays: arrays
    )
    rows = tuple(range(x.ndim - 1))
    to_kernel = jnp.tensordot(x, gradient, (rows, rows), precision=precision)
    return jnp.matmul(gradient, kernel.T, precision=precision), to_kernel


def _held_apart(*arrays):
    return jax.lax.optimization_barrier(arrays)


dense.defvjp(_dense_forward, _dense_backward)


class Linear(nnx.Linear):
    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., in) -> (..., out)."""
        y = dense(x.astype(self.dtype), self.kernel[...].astype(self.dtype), self.precision)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def linear(
    features_in: int,
    features_out: int,
    names: tuple[str | None, str | None],
    *,
    use_bias: bool = True,
    precision: jax.lax.Precision | None = None,
    dtype,
    param_dtype,
    rngs,
) -> Linear:
    """A linear layer, kernel (in, out), whose kernel dimensions have the logical axes `names`."""
    return Linear(
        features_in,
        features_out,
        use_bias=use_bias,
        precision=precision,
        kernel_metadata=axes(*names),
        bias_metadata=axes(None),
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def conv(
    channels_in: int,
    channels_out: int,
    kernel_size: int,
    *,
    strides: int = 1,
    padding: int | tuple[tuple[int, int], ...] | None = None,
    dtype,
    param_dtype,
    rngs,
) -> nnx.Conv:
    """A convolution, kernel (h, w, in, out). Padding defaults to that which keeps the size."""
    if padding is None:
        padding = (kernel_size - 1) // 2
    return (PointwiseConv if kernel_size == 1 else nnx.Conv)(
        channels_in,
        channels_out,
        (kernel_size, kernel_size),
        strides=strides,
        padding=((padding, padding),) * 2 if isinstance(padding, int) else padding,
        kernel_metadata=axes(None, None, "conv_in", "conv_out"),
        bias_metadata=axes(None),
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


class PointwiseConv(nnx.Conv):
    """A 1x1 convolution as the matmul it is: on XLA:CPU three times as fast, gradients included."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, h, w, in) -> (b, h, w, out)."""
        kernel = self.kernel[...].astype(self.dtype)
        return dense(x.astype(self.dtype), kernel[0, 0]) + self.bias[...].astype(self.dtype)


class Upsample2x(nnx.Module):
    """PyTorch's ConvTranspose2d with kernel 2 and stride 2: y[2i+a, 2j+b] = x[i, j] @ kernel[a, b].

    The windows do not overlap, so it is one matmul and a rearrangement. Kernel (h, w, in, out).
    """

    def __init__(self, channels: int, *, dtype, param_dtype, rngs):
        init = nnx.initializers.lecun_normal(in_axis=-2, out_axis=-1)
        self.kernel = nnx.Param(
            init(rngs.params(), (2, 2, channels, channels), param_dtype),
            **axes(None, None, "conv_in", "conv_out"),
        )
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype), **axes(None))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, h, w, c) -> (b, 2h, 2w, c)."""
        kernel = self.kernel[...].astype(self.dtype)
        y = dense(x.astype(self.dtype), rearrange(kernel, "y x i o -> i (y x o)"))
        y = rearrange(y, "b h w (y x o) -> b (h y) (w x) o", y=2, x=2)
        return y + self.bias[...].astype(self.dtype)


def group_statistics(
    x: jax.Array, groups: int, epsilon: float, strips: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Mean and 1/std of GroupNorm (arXiv:1803.08494), per channel.

    (b, h, w, c) -> two float32 (b, 1, 1, c). Pixels are summed channel by channel and only then are
    the channels of a group put together: the large arrays keep their shape. The variance takes a
    second pass: the one-pass form loses digits where the mean is large. Maps in strips are read
    once nevertheless, as what they are apart from the mean of their first rows: of that the mean
    is not large.

    Args:
        strips: entries of the batch that are one image together (k3jax/movq_strips.py).
    """
    b, _, _, c = x.shape

    def over_strips(per_channel):
        mean = per_channel.reshape(b // strips, strips, 1, 1, c).mean(1)
        return jnp.repeat(mean, strips, axis=0)

    def over_groups(per_channel):
        means = per_channel.reshape(b, groups, c // groups).mean(-1)
        return jnp.repeat(means, c // groups, axis=-1).reshape(b, 1, 1, c)

    if strips > 1:
        near = over_strips(x[:, 0].astype(jnp.float32).mean(1))
        apart = x.astype(jnp.float32) - near
        offset, square = (over_strips(v.mean((1, 2))) for v in (apart, jnp.square(apart)))
        own = near + offset
        mean = over_groups(own)
        variance = over_groups(square - jnp.square(offset) + jnp.square(own - mean))
        return mean, jax.lax.rsqrt(jnp.maximum(variance, 0) + epsilon)
    x = x.astype(jnp.float32)
    mean = over_groups(x.mean((1, 2)))
    variance = over_groups(jnp.square(x - mean).mean((1, 2)))
    return mean, jax.lax.rsqrt(variance + epsilon)


class GroupNorm(nnx.Module):
    """GroupNorm with a learned scale and bias per channel; computes in float32, returns `dtype`."""

    def __init__(self, channels: int, groups: int, epsilon: float, *, dtype, param_dtype):
        if channels % groups:
            raise ValueError(f"{channels} channels do not split into {groups} groups.")
        self.scale = nnx.Param(jnp.ones((channels,), param_dtype), **axes(None))
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype), **axes(None))
        self.groups, self.epsilon, self.dtype = groups, epsilon, dtype

    def affine(self, x: jax.Array, strips: int = 1) -> tuple[jax.Array, jax.Array]:
        """(factor, offset), float32 (b, 1, 1, c), with norm(x) = x factor + offset."""
        mean, inverse_std = group_statistics(x, self.groups, self.epsilon, strips)
        factor = inverse_std * self.scale[...].astype(jnp.float32)
        return factor, self.bias[...].astype(jnp.float32) - mean * factor

    def __call__(self, x: jax.Array) -> jax.Array:
        factor, offset = self.affine(x)
        return (x.astype(jnp.float32) * factor + offset).astype(self.dtype)


class RMSNorm(nnx.Module):
    """T5's layer norm: no mean, no bias. float32 in, `dtype` out.

    Source: transformers, models/t5/modeling_t5.py, T5LayerNorm.
    """

    def __init__(self, features: int, epsilon: float, *, dtype, param_dtype):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype), **axes(None))
        self.epsilon, self.dtype = epsilon, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
        return (x * self.scale[...].astype(jnp.float32)).astype(self.dtype)
