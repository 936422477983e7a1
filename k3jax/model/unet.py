# SPDX-License-Identifier: Apache-2.0
"""The denoising U-Net: noisy latents, time and context -> predicted noise.

There is no middle block: the deepest down level and the first up level both run at the lowest
resolution. Source: ai-forever/Kandinsky-3, model/unet.py; diffusers, unet_kandinsky3.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from k3jax.config import UNetConfig
from k3jax.model.conditioning import (
    Conditioning,
    ContextCache,
    KeysValues,
    as_conditioning,
)
from k3jax.model.context import Context
from k3jax.model.layers import GroupNorm, conv, linear
from k3jax.model.unet_blocks import (
    MAP,
    NORM_EPSILON,
    AttentionBlock,
    ContextPooling,
    ResNetBlock,
)
from k3jax.sharding import constrain


class TimeEmbedding(nnx.Module):
    """Sinusoids and two linear layers, in float32: timesteps (b,) -> (b, time_embedding_dim)."""

    def __init__(self, config: UNetConfig, *, param_dtype, rngs):
        # TPUs multiply float32 in bfloat16 unless told otherwise.
        new_linear = functools.partial(
            linear,
            precision=jax.lax.Precision.HIGHEST,
            dtype=jnp.float32,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.linear_1 = new_linear(config.init_channels, config.time_embedding_dim, (None, None))
        self.linear_2 = new_linear(
            config.time_embedding_dim, config.time_embedding_dim, (None, None)
        )
        self.channels = config.init_channels

    @jax.named_scope("time_embedding")
    def __call__(self, timesteps: jax.Array) -> jax.Array:
        half = self.channels // 2
        frequencies = jnp.exp(-jnp.log(10000.0) / (half - 1) * jnp.arange(half, dtype=jnp.float32))
        angles = timesteps.astype(jnp.float32)[:, None] * frequencies
        sinusoids = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        return self.linear_2(jax.nn.silu(self.linear_1(sinusoids)))


class Level(nnx.Module):
    """One resolution of the U-Net: residual, cross-attention, residual; `layers_per_block` times.

    Down levels begin with the self-attention and end with the downsampling; up levels begin with
    the upsampling and end with the self-attention.
    """

    def __init__(
        self,
        channels: list[tuple[int, int, int]],
        config: UNetConfig,
        *,
        self_attention: int | None,
        cross_attention: bool,
        up: bool,
        resample: bool,
        dtype,
        param_dtype,
        rngs,
    ):
        """
        Args:
            channels: per layer: in, between (where the cross-attention is), out.
            self_attention: its channels, or None for a level without.
            resample: upsamples in the first, or downsamples in the last residual block.
        """
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        last = len(channels) - 1
        self.self_attention = (
            None
            if self_attention is None
            else AttentionBlock(self_attention, None, config, **kwargs)
        )
        self.resnets_in = nnx.List(
            ResNetBlock(a, b, config, upsample=up and resample and i == 0, **kwargs)
            for i, (a, b, _) in enumerate(channels)
        )
        self.cross_attentions = (
            nnx.List(
                AttentionBlock(b, config.cross_attention_dim, config, **kwargs)
                for _, b, _ in channels
            )
            if cross_attention
            else None
        )
        self.resnets_out = nnx.List(
            ResNetBlock(b, c, config, downsample=not up and resample and i == last, **kwargs)
            for i, (_, b, c) in enumerate(channels)
        )
        self.up = up

    def keys_values(self, context: Context) -> list[KeysValues] | None:
        """Of each cross-attention; None for a level without."""
        if self.cross_attentions is None:
            return None
        states = context.hidden_states
        return [block.attention.keys_values(states) for block in self.cross_attentions]

    def __call__(
        self,
        x: jax.Array,
        temb: jax.Array,
        keys_values: list[KeysValues] | None,
        bias: jax.Array | None,
        remat: bool = False,
    ) -> jax.Array:
        """`keys_values`: of each cross-attention, with the bias of its scores; see `UNet.remat`."""
        run = _rematerialised if remat else _plain
        if self.self_attention is not None and not self.up:
            x = run(self.self_attention, x, temb)
        for i, (resnet_in, resnet_out) in enumerate(
            zip(self.resnets_in, self.resnets_out, strict=True)
        ):
            x = run(resnet_in, x, temb)
            if self.cross_attentions is not None:
                cached = None if keys_values is None else keys_values[i]
                x = run(self.cross_attentions[i], x, temb, cached, bias)
            x = run(resnet_out, x, temb)
        if self.self_attention is not None and self.up:
            x = run(self.self_attention, x, temb)
        return x


class UNet(nnx.Module):
    def __init__(self, config: UNetConfig, *, dtype, param_dtype, rngs):
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config, self.dtype = config, dtype
        self.remat = False
        """Set for training: keeps only what goes into each block, and computes the rest again."""
        self.time_embedding = TimeEmbedding(config, param_dtype=param_dtype, rngs=rngs)
        self.context_pooling = ContextPooling(config, **kwargs)
        self.conv_in = conv(config.in_channels, config.init_channels, 3, **kwargs)

        widths = (config.init_channels, *config.block_out_channels)
        levels = len(config.block_out_channels)
        layers = config.layers_per_block
        self.down_blocks = nnx.List(
            Level(
                [(widths[i], widths[i + 1], widths[i + 1])] + [(widths[i + 1],) * 3] * (layers - 1),
                config,
                self_attention=widths[i] if config.add_self_attention[i] else None,
                cross_attention=config.add_cross_attention[i],
                up=False,
                resample=i < levels - 1,
                **kwargs,
            )
            for i in range(levels)
        )
        # The references read the flags of the up levels backwards from the end of the whole tuple,
        # which has 4 entries even where the U-Net has fewer levels; the weights depend on it.
        cross, self_ = config.add_cross_attention[::-1], config.add_self_attention[::-1]
        self.up_blocks = nnx.List(
            Level(
                self._up_channels(widths, levels - 1 - i, layers),
                config,
                self_attention=widths[levels - 1 - i] if self_[i] else None,
                cross_attention=cross[i],
                up=True,
                resample=i > 0,
                **kwargs,
            )
            for i in range(levels)
        )
        self.norm_out = GroupNorm(
            config.init_channels, config.groups, NORM_EPSILON, dtype=dtype, param_dtype=param_dtype
        )
        self.conv_out = conv(config.init_channels, config.out_channels, 3, **kwargs)

    @staticmethod
    def _up_channels(widths, level, layers):
        """Channels of the up level that mirrors down level `level`; its input has the skip too."""
        narrow, wide = widths[level], widths[level + 1]
        skip = wide if level < len(widths) - 2 else 0
        return [
            (wide + skip, wide + skip, wide),
            *[(wide, wide, wide)] * (layers - 2),
            (wide, wide, narrow),
        ]

    def context_cache(self, context: Context) -> ContextCache:
        """What `__call__` computes from a context alone: for a loop, to be computed once."""
        return ContextCache(
            pooled=self.context_pooling(context),
            bias=context.bias,
            down=[level.keys_values(context) for level in self.down_blocks],
            up=[level.keys_values(context) for level in self.up_blocks],
        )

    @jax.named_scope("unet")
    def __call__(
        self,
        sample: jax.Array,
        timesteps: jax.Array,
        conditioning: Conditioning | Context | None,
    ) -> jax.Array:
        """Predicts the noise in `sample`.

        Args:
            sample: (b, h, w, c); h and w divisible by 2^(levels - 1). With the conditioning's extra
                channels it has the config's in_channels.
            timesteps: (b,), 0 to 999, need not be integers.
            conditioning: its guidance is the sampler's business (`k3jax.sampling.denoise`). A
                context alone will do. None or no context: not even a null embedding (only a U-Net
                without cross-attention, or the pixels themselves as keys, allows it).

        Returns:
            float32 (b, h, w, out_channels).
        """
        conditioning = as_conditioning(conditioning)
        if conditioning.extra_channels is not None:
            sample = jnp.concatenate([sample, conditioning.extra_channels], axis=-1)
        context = conditioning.context
        if isinstance(context, Context):
            context = self.context_cache(context)
        levels = len(self.down_blocks)
        down, up, bias = [None] * levels, [None] * levels, None
        time_embedding = self.time_embedding(timesteps)
        if context is not None:
            time_embedding = time_embedding + context.pooled
            down, up, bias = context.down, context.up, context.bias
        temb = jax.nn.silu(time_embedding)

        x = constrain(self.conv_in(sample.astype(self.dtype)), *MAP)
        skips = []
        for i, (level, keys_values) in enumerate(zip(self.down_blocks, down, strict=True)):
            with jax.named_scope(f"down_{i}"):
                x = level(x, temb, keys_values, bias, self.remat)
            skips.append(x)
        skips.pop()
        for i, (level, keys_values) in enumerate(zip(self.up_blocks, up, strict=True)):
            if i:
                x = jnp.concatenate([x, skips.pop()], axis=-1)
            with jax.named_scope(f"up_{i}"):
                x = level(x, temb, keys_values, bias, self.remat)
        x = self.conv_out(jax.nn.silu(self.norm_out(x))).astype(jnp.float32)
        return constrain(x, *MAP)


def _plain(block: nnx.Module, *args: Any) -> jax.Array:
    return block(*args)


_rematerialised = jax.checkpoint(_plain)
