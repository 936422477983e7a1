# SPDX-License-Identifier: Apache-2.0
"""The layers of all three networks: linear, convolution, resampling and norms.

Activations are b h w c (batch, height, width, channels) everywhere. Statistics of norms are float32
whatever the compute dtype.
"""

import contextvars
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from k3jax.sharding import axes, constrain, gathered, split_as_columns, traced_mesh


CONVOLVED = ("batch", None, None, "conv_out")
"""Logical axes of what a convolution returns."""

NO_INIT = nnx.initializers.zeros_init()
"""Weights are loaded, or drawn leaf by leaf (k3jax/training/random_weights.py). Of random
initialisers nothing would remain but the time to trace them, nearly half of what making the
modules took."""


_FAST_CPU_GRADIENTS = contextvars.ContextVar("fast_cpu_gradients", default=False)


def with_fast_cpu_gradients(function: Callable) -> Callable:
    """A loss whose gradients XLA:CPU computes twice as fast; it has no forward derivatives.

    The gradient of `dense` then comes from a rule of its own.
    """

    @functools.wraps(function)
    def run(*args, **kwargs):
        token = _FAST_CPU_GRADIENTS.set(True)
        try:
            return function(*args, **kwargs)
        finally:
            _FAST_CPU_GRADIENTS.reset(token)

    return run


def dense(x: jax.Array, kernel: jax.Array, precision: jax.lax.Precision | None = None) -> jax.Array:
    """(..., in) @ (in, out) -> (..., out)."""
    if _FAST_CPU_GRADIENTS.get():
        return _dense_for_training(x, kernel, precision)
    return jnp.matmul(x, kernel, precision=precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dense_for_training(x, kernel, precision):
    """`dense`, whose gradient keeps two computations apart.

    For the kernel's gradient XLA:CPU transposes x, and fuses into that transposition the operations
    that compute x: a strided loop with exponentials in it. Apart, both are quick.
    """
    return jnp.matmul(x, kernel, precision=precision)


def _dense_forward(x, kernel, precision):
    return _dense_for_training(x, kernel, precision), (x, kernel)


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


_dense_for_training.defvjp(_dense_forward, _dense_backward)


def pointwise(
    x: jax.Array, kernel: jax.Array, precision: jax.lax.Precision | None = None
) -> jax.Array:
    """`dense` of a map (b, h, w, in) -> (b, h, w, out).

    On TPUs it is a 1x1 convolution: they lay out the maps of products otherwise than those of the
    3x3 convolutions around them, and copy every one from one layout to the other.
    """
    return jax.lax.platform_dependent(
        x,
        kernel,
        tpu=functools.partial(_pointwise_on_tpu, precision=precision),
        default=functools.partial(dense, precision=precision),
    )


def _pointwise_on_tpu(x, kernel, precision=None):
    return convolve(x, kernel[None, None], "VALID", precision=precision)


def convolve(x: jax.Array, kernel: jax.Array, padding, strides=(1, 1), **kwargs) -> jax.Array:
    """(b, h, w, in), (y, x, in, out) -> (b, h, w, out); see jax.lax.conv_general_dilated."""
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **kwargs
    )


class Linear(nnx.Linear):
    def __call__(self, x: jax.Array, rows: str = "batch") -> jax.Array:
        """(rows, ..., in) -> (rows, ..., out); `rows` is the logical axis of the first."""
        product = pointwise if x.ndim == 4 else dense
        y = product(x.astype(self.dtype), gathered(self.kernel, self.dtype), self.precision)
        y = y if self.bias is None else y + self.bias[...].astype(self.dtype)
        return split_as_columns(y, self.kernel, rows)


def linear(
    features_in: int,
    features_out: int,
    names: tuple[str | None, str | None],
    *,
    heads: int | None = None,
    use_bias: bool = True,
    precision: jax.lax.Precision | None = None,
    dtype,
    param_dtype,
    rngs,
) -> Linear:
    """A linear layer, kernel (in, out), whose kernel dimensions have the logical axes `names`.

    Args:
        heads: attention heads in the dimension called "heads".
    """
    return Linear(
        features_in,
        features_out,
        use_bias=use_bias,
        precision=precision,
        kernel_init=NO_INIT,
        kernel_metadata=axes(*names, heads=heads),
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
) -> "Conv":
    """A convolution, kernel (h, w, in, out). Padding defaults to that which keeps the size."""
    if padding is None:
        padding = (kernel_size - 1) // 2
    return Conv(
        channels_in,
        channels_out,
        (kernel_size, kernel_size),
        strides=(strides, strides),
        padding=((padding, padding),) * 2 if isinstance(padding, int) else padding,
        kernel_init=NO_INIT,
        kernel_metadata=axes(None, None, "conv_in", "conv_out"),
        bias_metadata=axes(None),
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


class Conv(nnx.Conv):
    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, h, w, in) -> (b, h', w', out)."""
        x, kernel = x.astype(self.dtype), gathered(self.kernel, self.dtype)
        if self.kernel_size == (1, 1):  # a product is three times as fast on XLA:CPU
            y = pointwise(x, kernel[0, 0])
        else:
            y = convolve(x, kernel, self.padding, strides=self.strides)
        return constrain(y + self.bias[...].astype(self.dtype), *CONVOLVED)


class Upsample2x(nnx.Module):
    """PyTorch's ConvTranspose2d with kernel 2 and stride 2: y[2i+a, 2j+b] = x[i, j] @ kernel[a, b].

    The windows do not overlap, so it is four matmuls and a rearrangement; TPUs skip the zeros of a
    convolution over an enlarged map, and need not rearrange. Kernel (h, w, in, out).
    """

    def __init__(self, channels: int, *, dtype, param_dtype, rngs):
        shape = (2, 2, channels, channels)
        self.kernel = nnx.Param(
            NO_INIT(rngs.params(), shape, param_dtype), **axes(None, None, "conv_in", "conv_out")
        )
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype), **axes(None))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, h, w, c) -> (b, 2h, 2w, c)."""
        kernel = gathered(self.kernel, self.dtype)
        y = jax.lax.platform_dependent(
            x.astype(self.dtype), kernel, tpu=_upsample_on_tpu, default=_upsample_by_products
        )
        return constrain(y + self.bias[...].astype(self.dtype), *CONVOLVED)


def _upsample_on_tpu(x, kernel):
    return convolve(x, kernel[::-1, ::-1], ((1, 1), (1, 1)), lhs_dilation=(2, 2))


def _upsample_by_products(x, kernel):
    # One product for each place: columns of a kernel with all four together could not be split.
    rows = [jnp.stack([dense(x, kernel[down, right]) for right in (0, 1)], 3) for down in (0, 1)]
    places = jnp.stack(rows, 2)
    return rearrange(places, "b h y w x o -> b (h y) (w x) o")


def group_statistics(
    x: jax.Array, groups: int, epsilon: float, strips: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Mean and 1/std of GroupNorm (arXiv:1803.08494), per channel.

    (b, h, w, c) -> two float32 (b, 1, 1, c). Pixels are summed channel by channel and only then are
    the channels of a group put together: the large arrays keep their shape. A float32 variance
    takes a second pass, for the one-pass form loses digits where the mean is large. In half
    precision such values have lost more of them by their own rounding, and one pass, which XLA puts
    into the kernel that computes x, is as good.

    Args:
        strips: entries of the batch that are one image together (k3jax/model/movq_strips.py).
    """
    b, _, _, c = x.shape

    def over_pixels(values):
        means = values.mean((1, 2))
        if strips > 1:
            means = jnp.repeat(means.reshape(b // strips, strips, c).mean(1), strips, axis=0)
        return means.reshape(b, 1, 1, c)

    mesh = traced_mesh()
    # Groups that are split over two devices are summed on each.
    whole = mesh is not None and strips == 1 and groups % mesh.shape["tensor"] != 0

    def over_groups(per_channel):
        if whole:
            per_channel = constrain(per_channel, "batch", None, None, None)
        means = per_channel.reshape(b, groups, c // groups).mean(-1)
        return jnp.repeat(means, c // groups, axis=-1).reshape(b, 1, 1, c)

    half = x.dtype.itemsize < 4
    x = x.astype(jnp.float32)
    own = over_pixels(x)
    mean = over_groups(own)
    if half:
        own_variance = jnp.maximum(over_pixels(jnp.square(x)) - jnp.square(own), 0)
        variance = over_groups(own_variance + jnp.square(own - mean))
    else:
        variance = over_groups(over_pixels(jnp.square(x - mean)))
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
