# SPDX-License-Identifier: Apache-2.0
"""Blocks of MoVQ: residual and attention blocks whose norms may be modulated by the latents.

At 1024x1024 one activation of the decoder is a gigabyte. Maps beyond STRIP_PIXELS are therefore
convolved strip by strip (`convolve_rows`): what goes into a convolution (upsampled or normalised
maps) only ever exists for the rows at hand. The result is the same; only the statistics of the
norms need the whole map. On a TPU the decoder's maps are laid out in strips instead
(k3jax/model/movq_strips.py).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from k3jax.model.attention import AttentionLayer, attention, token_axis
from k3jax.model.layers import CONVOLVED, GroupNorm, conv, convolve, linear
from k3jax.model.movq_strips import (
    convolve_enlarged_strips,
    convolve_strips,
    enlarge_and_apply,
    window_sums,
)
from k3jax.sharding import constrain, gathered


NORM_EPSILON = 1e-6
SPATIAL_NORM_GROUPS = 32
"""Fixed in both references, whatever the config's norm_num_groups."""
STRIP_PIXELS = 2**17
"""Most pixels of a map that are prepared for a 3x3 convolution at once."""

# The rows of a map at given indices (int32 (n,)), or all of them for None: (b, n, w, c).
Rows = Callable[[jax.Array | None], jax.Array]


def convolve_rows(layer: nnx.Conv, rows: Rows, height: int, width: int) -> jax.Array:
    """A 3x3 convolution (padding 1) of the map `rows` of height x width pixels."""
    strip = _strip(height, width)
    if strip == height:
        return layer(rows(None))

    def one(out, first):
        index = first - 1 + jnp.arange(strip + 2)
        inside = (index >= 0) & (index < height)
        x = jnp.where(inside[:, None, None], rows(jnp.clip(index, 0, height - 1)), 0)
        kernel = gathered(layer.kernel, layer.dtype)
        y = convolve(x.astype(layer.dtype), kernel, ((0, 0), (1, 1)))
        y = constrain(y + layer.bias[...].astype(layer.dtype), *CONVOLVED)
        return jax.lax.dynamic_update_slice_in_dim(out, y, first, axis=1), None

    start = _first_pixel(rows(jnp.zeros(1, jnp.int32)), layer)
    shape = (start.shape[0], height, width, layer.out_features)
    start = constrain(jnp.broadcast_to(start, shape), *CONVOLVED)
    out, _ = jax.lax.scan(one, start, jnp.arange(0, height, strip))
    return out


def convolve_upsampled(layer: nnx.Conv, x: jax.Array, strips: int = 1) -> jax.Array:
    """A 3x3 convolution (padding 1) of x enlarged twice by nearest neighbours.

    Each pixel of x stands for four, and a 3x3 window sees four different pixels of x: the output at
    each of the four places is a 2x2 convolution of x itself, with sums of the weights. The values
    are the same from 4 products instead of 9, and the enlarged map never exists.
    """
    if strips > 1:
        return convolve_enlarged_strips(layer, x, strips)
    b, height, width, _ = x.shape
    kernels = window_sums(gathered(layer.kernel)).astype(layer.dtype)
    strip = _strip(height, 4 * width)

    def enlarged(x):
        """(b, strip + 2, w, c) with a row of context on either side -> (b, 2 strip, 2 w, out)."""

        def at(down, right):
            rows = x[:, down : down + strip + 1].astype(layer.dtype)
            y = convolve(rows, kernels[down, right], ((0, 0), (1 - right, right)))
            return y + layer.bias[...].astype(layer.dtype)

        y = jnp.stack([jnp.stack([at(down, right) for right in (0, 1)], 3) for down in (0, 1)], 2)
        return constrain(y.reshape(b, 2 * strip, 2 * width, -1), *CONVOLVED)

    x = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))
    if strip == height:
        return enlarged(x)

    def one(out, first):
        y = enlarged(jax.lax.dynamic_slice_in_dim(x, first, strip + 2, axis=1))
        return jax.lax.dynamic_update_slice_in_dim(out, y, 2 * first, axis=1), None

    start = _first_pixel(x[:, 1:], layer)
    shape = (b, 2 * height, 2 * width, layer.out_features)
    start = constrain(jnp.broadcast_to(start, shape), *CONVOLVED)
    out, _ = jax.lax.scan(one, start, jnp.arange(0, height, strip))
    return out


def _strip(height: int, pixels_per_row: int) -> int:
    """Rows done at once: a divisor of height, of at most STRIP_PIXELS where rows allow it."""
    most = max(STRIP_PIXELS // pixels_per_row, 1)
    return next(n for n in range(min(most, height), 0, -1) if height % n == 0)


def _first_pixel(row: jax.Array, layer: nnx.Conv) -> jax.Array:
    """What the result of a scan over strips starts from; every value is overwritten.

    It depends on the input, which keeps the compiler from making the buffers of all convolutions at
    the start of the program.
    """
    return row[:, :1, :1, :1].astype(layer.dtype)


def take_rows(x: jax.Array, index: jax.Array | None, factor: int = 1) -> jax.Array:
    """Rows `index` of x enlarged `factor` times by nearest neighbours, (b, n, factor w, c)."""
    if index is not None:
        x = jnp.take(x, index // factor, axis=1)
    elif factor > 1:
        x = jnp.repeat(x, factor, axis=1)
    if factor == 1:
        return x
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, :, None], (b, h, w, factor, c)).reshape(b, h, w * factor, c)


class PlainNorm(GroupNorm):
    """The encoder's norm: GroupNorm; takes latents, so that blocks call both norms alike."""

    def __init__(self, channels: int, groups: int, *, dtype, param_dtype, rngs):
        super().__init__(channels, groups, NORM_EPSILON, dtype=dtype, param_dtype=param_dtype)

    def rows_of(self, x: jax.Array, latents: None = None, strips: int = 1) -> Rows:
        factor, offset = self.affine(x, strips)
        return lambda index: (take_rows(x, index) * factor + offset).astype(self.dtype)


class SpatialNorm(nnx.Module):
    """GroupNorm, scaled and shifted per pixel by 1x1 convolutions of the upsampled latents.

    There is no `1 +` on the scale. The 1x1 convolutions are pointwise, so they are done before the
    upsampling: the same values from a fraction of the pixels.
    """

    def __init__(self, channels: int, latent_channels: int, *, dtype, param_dtype, rngs):
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.norm = GroupNorm(
            channels, SPATIAL_NORM_GROUPS, NORM_EPSILON, dtype=dtype, param_dtype=param_dtype
        )
        self.conv_y = linear(latent_channels, channels, (None, None), **kwargs)
        self.conv_b = linear(latent_channels, channels, (None, None), **kwargs)
        self.dtype = dtype

    def silu_of(self, x: jax.Array, latents: jax.Array, strips: int) -> jax.Array:
        """silu(norm(x)) of a map in strips."""
        factor, offset = self.norm.affine(x, strips)
        scale, shift = self.conv_y(latents, "strips"), self.conv_b(latents, "strips")

        def one(x, scale, shift, factor, offset):
            return jax.nn.silu((x * factor + offset) * scale + shift).astype(self.dtype)

        return enlarge_and_apply(one, x, (scale, shift), (factor, offset))

    def rows_of(self, x: jax.Array, latents: jax.Array, strips: int = 1) -> Rows:
        """The normalised map by rows; x (b, h, w, c), latents (b, h/f, w/f, latent channels)."""
        enlarge = x.shape[1] // latents.shape[1]
        factor, offset = self.norm.affine(x, strips)
        axis = _map(strips)[0]
        scale, shift = self.conv_y(latents, axis), self.conv_b(latents, axis)

        def rows(index):
            normed = take_rows(x, index) * factor + offset
            normed = normed * take_rows(scale, index, enlarge) + take_rows(shift, index, enlarge)
            return normed.astype(self.dtype)

        return rows


class ResBlock(nnx.Module):
    """norm - SiLU - 3x3 - norm - SiLU - 3x3 plus a shortcut (1x1 where the width changes)."""

    def __init__(self, channels_in: int, channels_out: int, norm, **kwargs):
        """`norm(channels, **kwargs)` creates a norm: PlainNorm or SpatialNorm, partly applied."""
        self.norm1 = norm(channels_in, **kwargs)
        self.conv1 = conv(channels_in, channels_out, 3, **kwargs)
        self.norm2 = norm(channels_out, **kwargs)
        self.conv2 = conv(channels_out, channels_out, 3, **kwargs)
        self.conv_shortcut = (
            conv(channels_in, channels_out, 1, **kwargs) if channels_in != channels_out else None
        )

    @jax.named_scope("resnet")
    def __call__(
        self, x: jax.Array, latents: jax.Array | None = None, strips: int = 1
    ) -> jax.Array:
        out = norm_silu_conv(self.norm1, self.conv1, x, latents, strips)
        out = norm_silu_conv(self.norm2, self.conv2, out, latents, strips)
        if self.conv_shortcut is not None and strips > 1:
            x = convolve_strips(self.conv_shortcut, x, strips)
        elif self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return constrain(out + x, *_map(strips))


class SpatialAttention(AttentionLayer):
    """Attention of one head over all pixels, with biases, plus a shortcut."""

    def __init__(self, channels: int, norm, **kwargs):
        self.norm = norm(channels, **kwargs)
        new_linear = functools.partial(linear, channels, channels, heads=1, **kwargs)
        self.to_q, self.to_k, self.to_v = (new_linear(("embed", "heads")) for _ in range(3))
        self.to_out = new_linear(("heads", "embed"))

    @jax.named_scope("attention_block")
    def __call__(
        self, x: jax.Array, latents: jax.Array | None = None, strips: int = 1
    ) -> jax.Array:
        normed = self.norm.rows_of(x, latents, strips)(None)
        tokens = rearrange(normed, "(b s) h w c -> b (s h w) 1 c", s=strips)
        tokens = constrain(tokens, "batch", token_axis(1), None, None)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        out = attention(q, k, v, scale=x.shape[-1] ** -0.5, form=self.attention_form)
        return constrain(x + self.to_out(out).reshape(x.shape), *_map(strips))


def _map(strips: int) -> tuple[str | None, ...]:
    """Logical axes of a map between blocks."""
    return ("batch" if strips == 1 else "strips", None, None, None)


def norm_silu_conv(
    norm, layer: nnx.Conv, x: jax.Array, latents: jax.Array | None, strips: int = 1
) -> jax.Array:
    """layer(silu(norm(x))), a part at a time where the map is large."""
    if strips > 1:
        return convolve_strips(layer, norm.silu_of(x, latents, strips), strips)
    rows = norm.rows_of(x, latents)
    return convolve_rows(layer, lambda index: jax.nn.silu(rows(index)), *x.shape[1:3])
