# SPDX-License-Identifier: Apache-2.0
"""Blocks of the U-Net: BigGAN-deep residual blocks and attention blocks under time modulation.

`temb` is always silu(time embedding), float32 (b, time_embedding_dim): every norm applies the SiLU,
so it is applied once, by the U-Net. Source: ai-forever/Kandinsky-3, model/unet.py and model/nn.py.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from k3jax.config import UNetConfig
from k3jax.model.attention import AttentionLayer, attention, token_axis
from k3jax.model.conditioning import KeysValues
from k3jax.model.context import Context
from k3jax.model.layers import Upsample2x, conv, group_statistics, linear
from k3jax.sharding import constrain


NORM_EPSILON = 1e-5
MAP = ("batch", None, None, None)
"""Logical axes of a map between blocks: each device has all channels of its images."""


class ConditionalGroupNorm(nnx.Module):
    """GroupNorm whose scale and shift are a linear function of `temb`."""

    def __init__(self, channels: int, config: UNetConfig, *, dtype, param_dtype, rngs):
        self.modulation = linear(
            config.time_embedding_dim,
            2 * channels,
            ("time", None),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.groups, self.dtype = config.groups, dtype

    def __call__(self, x: jax.Array, temb: jax.Array) -> jax.Array:
        modulation = self.modulation(temb).astype(jnp.float32)
        scale, shift = (
            constrain(part, "batch", None)[:, None, None, :]
            for part in jnp.split(modulation, 2, axis=-1)
        )
        mean, inverse_std = group_statistics(x, self.groups, NORM_EPSILON)
        normed = (x.astype(jnp.float32) - mean) * inverse_std
        return (normed * (scale + 1) + shift).astype(self.dtype)


class Block(nnx.Module):
    """norm - SiLU - [upsample] - convolution - [downsample]."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel_size: int,
        config: UNetConfig,
        *,
        upsample: bool = False,
        downsample: bool = False,
        dtype,
        param_dtype,
        rngs,
    ):
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.norm = ConditionalGroupNorm(channels_in, config, **kwargs)
        self.upsample = Upsample2x(channels_in, **kwargs) if upsample else None
        self.conv = conv(channels_in, channels_out, kernel_size, **kwargs)
        self.downsample = _downsample(channels_out, **kwargs) if downsample else None

    def __call__(self, x: jax.Array, temb: jax.Array) -> jax.Array:
        x = jax.nn.silu(self.norm(x, temb))
        x = x if self.upsample is None else self.upsample(x)
        x = self.conv(x)
        return x if self.downsample is None else self.downsample(x)


class ResNetBlock(nnx.Module):
    """Bottleneck 1x1 - 3x3 - 3x3 - 1x1 plus a shortcut with resampling of its own (BigGAN-deep).

    Upsampling happens before the first 3x3, downsampling after the second.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        config: UNetConfig,
        *,
        upsample: bool = False,
        downsample: bool = False,
        dtype,
        param_dtype,
        rngs,
    ):
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        hidden = max(channels_in, channels_out) // config.compression_ratio
        self.blocks = nnx.List(
            [
                Block(channels_in, hidden, 1, config, **kwargs),
                Block(hidden, hidden, 3, config, upsample=upsample, **kwargs),
                Block(hidden, hidden, 3, config, downsample=downsample, **kwargs),
                Block(hidden, channels_out, 1, config, **kwargs),
            ]
        )
        self.shortcut_upsample = Upsample2x(channels_in, **kwargs) if upsample else None
        self.shortcut_conv = (
            conv(channels_in, channels_out, 1, **kwargs) if channels_in != channels_out else None
        )
        self.shortcut_downsample = _downsample(channels_out, **kwargs) if downsample else None

    @jax.named_scope("resnet")
    def __call__(self, x: jax.Array, temb: jax.Array) -> jax.Array:
        out = x
        for block in self.blocks:
            out = block(out, temb)
        for layer in (self.shortcut_upsample, self.shortcut_conv, self.shortcut_downsample):
            x = x if layer is None else layer(x)
        return constrain(x + out, *MAP)


class Attention(AttentionLayer):
    """Multi-head attention without biases: (b, n, c) over (b, m, context_dim) -> (b, n, c)."""

    def __init__(
        self,
        query_dim: int,
        context_dim: int,
        channels_out: int,
        head_dim: int,
        *,
        dtype,
        param_dtype,
        rngs,
    ):
        if channels_out % head_dim:
            raise ValueError(f"{channels_out} channels do not split into heads of {head_dim}.")
        new_linear = functools.partial(
            linear,
            heads=channels_out // head_dim,
            use_bias=False,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.to_q = new_linear(query_dim, channels_out, ("embed", "heads"))
        self.to_k = new_linear(context_dim, channels_out, ("embed", "heads"))
        self.to_v = new_linear(context_dim, channels_out, ("embed", "heads"))
        self.to_out = new_linear(channels_out, channels_out, ("heads", "embed"))
        self.head_dim, self.heads = head_dim, channels_out // head_dim

    def keys_values(self, states: jax.Array) -> KeysValues:
        """Of what is attended to, (b, m, context_dim)."""
        return self.to_k(states), self.to_v(states)

    def __call__(
        self, x: jax.Array, keys_values: KeysValues, bias: jax.Array | None = None
    ) -> jax.Array:
        """`bias` (b, m) is added to the scores."""
        x = constrain(x, "batch", token_axis(self.heads), None)
        q, k, v = (
            rearrange(y, "b n (h d) -> b n h d", d=self.head_dim)
            for y in (self.to_q(x), *keys_values)
        )
        bias = None if bias is None else bias[:, None, None, :]
        out = attention(q, k, v, scale=self.head_dim**-0.5, bias=bias, form=self.attention_form)
        return self.to_out(rearrange(out, "b n h d -> b n (h d)"))


class AttentionBlock(nnx.Module):
    """Attention over the context, or over the pixels themselves, then a pointwise feed-forward."""

    def __init__(
        self,
        channels: int,
        context_dim: int | None,
        config: UNetConfig,
        *,
        dtype,
        param_dtype,
        rngs,
    ):
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.in_norm = ConditionalGroupNorm(channels, config, **kwargs)
        self.attention = Attention(
            channels, context_dim or channels, channels, config.attention_head_dim, **kwargs
        )
        self.out_norm = ConditionalGroupNorm(channels, config, **kwargs)
        hidden = channels * config.expansion_ratio
        self.feed_forward_in = linear(channels, hidden, ("embed", "mlp"), use_bias=False, **kwargs)
        self.feed_forward_out = linear(hidden, channels, ("mlp", "embed"), use_bias=False, **kwargs)

    @jax.named_scope("attention_block")
    def __call__(
        self,
        x: jax.Array,
        temb: jax.Array,
        keys_values: KeysValues | None = None,
        bias: jax.Array | None = None,
    ) -> jax.Array:
        """Without `keys_values` it is self-attention, whose keys are the normed pixels."""
        tokens = rearrange(self.in_norm(x, temb), "b h w c -> b (h w) c")
        if keys_values is None:
            keys_values = self.attention.keys_values(tokens)
        out = self.attention(tokens, keys_values, bias)
        x = constrain(x + out.reshape(x.shape), *MAP)
        out = jax.nn.silu(self.feed_forward_in(self.out_norm(x, temb)))
        return constrain(x + self.feed_forward_out(out), *MAP)


class ContextPooling(nnx.Module):
    """What the mean of the context attends to in the context, float32 (b, time_embedding_dim).

    The mean is over the window of each sample, its padding rows included (as in the references).
    """

    def __init__(self, config: UNetConfig, *, dtype, param_dtype, rngs):
        self.attention = Attention(
            config.cross_attention_dim,
            config.cross_attention_dim,
            config.time_embedding_dim,
            config.attention_head_dim,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    @jax.named_scope("context_pooling")
    def __call__(self, context: Context) -> jax.Array:
        rows = context.hidden_states.shape[1]
        inside = jnp.arange(rows) < context.lengths[:, None]
        states = jnp.where(inside[..., None], context.hidden_states.astype(jnp.float32), 0)
        mean = states.sum(1, keepdims=True) / context.lengths[:, None, None]
        keys_values = self.attention.keys_values(context.hidden_states)
        return self.attention(mean, keys_values, context.bias)[:, 0].astype(jnp.float32)


def _downsample(channels, **kwargs):
    return conv(channels, channels, 2, strides=2, padding=0, **kwargs)
