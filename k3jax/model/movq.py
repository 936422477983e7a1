# SPDX-License-Identifier: Apache-2.0
"""MoVQ, the image autoencoder (arXiv:2209.09002): images <-> latents of an eighth of the size.

Latents are the raw output of the encoder: never quantised, never scaled. The decoder's norms are
modulated by the latents. Source: ai-forever/Kandinsky-3, movq.py; diffusers, vq_model.py.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from k3jax.config import MoVQConfig
from k3jax.model.layers import conv
from k3jax.model.movq_blocks import (
    PlainNorm,
    ResBlock,
    SpatialAttention,
    SpatialNorm,
    convolve_upsampled,
    norm_silu_conv,
)
from k3jax.model.movq_strips import into_strips, out_of_strips, strips_on_tpu
from k3jax.sharding import axes


class EncoderLevel(nnx.Module):
    """Residual blocks (each followed by attention at the deepest level), then downsampling."""

    def __init__(self, channels_in, channels_out, config, *, attention, last, **kwargs):
        norm = functools.partial(PlainNorm, groups=config.norm_num_groups)
        widths = [channels_in] + [channels_out] * config.layers_per_block
        self.resnets = nnx.List(
            ResBlock(a, channels_out, norm, **kwargs) for a in widths[: config.layers_per_block]
        )
        self.attentions = (
            nnx.List(
                SpatialAttention(channels_out, norm, **kwargs)
                for _ in range(config.layers_per_block)
            )
            if attention
            else None
        )
        # PyTorch pads by one at the bottom and the right only.
        self.downsample = (
            None
            if last
            else conv(channels_out, channels_out, 3, strides=2, padding=((0, 1), (0, 1)), **kwargs)
        )

    @jax.named_scope("level")
    def __call__(self, x: jax.Array) -> jax.Array:
        for i, resnet in enumerate(self.resnets):
            x = resnet(x)
            if self.attentions is not None:
                x = self.attentions[i](x)
        return x if self.downsample is None else self.downsample(x)


class DecoderLevel(nnx.Module):
    """One more residual block than the encoder's level, then nearest upsampling and a 3x3."""

    def __init__(self, channels_in, channels_out, config, *, attention, last, **kwargs):
        layers = config.layers_per_block + 1
        norm = functools.partial(SpatialNorm, latent_channels=config.latent_channels)
        widths = [channels_in] + [channels_out] * layers
        self.resnets = nnx.List(ResBlock(a, channels_out, norm, **kwargs) for a in widths[:layers])
        self.attentions = (
            nnx.List(SpatialAttention(channels_out, norm, **kwargs) for _ in range(layers))
            if attention
            else None
        )
        self.upsample = None if last else conv(channels_out, channels_out, 3, **kwargs)

    @jax.named_scope("level")
    def __call__(self, x: jax.Array, latents: jax.Array, strips: int) -> jax.Array:
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, latents, strips)
            if self.attentions is not None:
                x = self.attentions[i](x, latents, strips)
        if self.upsample is None:
            return x
        return convolve_upsampled(self.upsample, x, strips)


class MidBlock(nnx.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels, norm, **kwargs):
        self.resnets = nnx.List(ResBlock(channels, channels, norm, **kwargs) for _ in range(2))
        self.attentions = nnx.List([SpatialAttention(channels, norm, **kwargs)])

    @jax.named_scope("mid_block")
    def __call__(
        self, x: jax.Array, latents: jax.Array | None = None, strips: int = 1
    ) -> jax.Array:
        x = self.resnets[0](x, latents, strips)
        x = self.attentions[0](x, latents, strips)
        return self.resnets[1](x, latents, strips)


class Encoder(nnx.Module):
    def __init__(self, config: MoVQConfig, **kwargs):
        widths = config.block_out_channels
        deepest = len(widths) - 1
        norm = functools.partial(PlainNorm, groups=config.norm_num_groups)
        self.conv_in = conv(config.in_channels, widths[0], 3, **kwargs)
        self.down_blocks = nnx.List(
            EncoderLevel(
                widths[max(i - 1, 0)],
                width,
                config,
                attention=i == deepest,
                last=i == deepest,
                **kwargs,
            )
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], norm, **kwargs)
        self.norm_out = norm(widths[-1], **kwargs)
        self.conv_out = conv(widths[-1], config.latent_channels, 3, **kwargs)

    @jax.named_scope("encoder")
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        x = self.mid_block(x)
        return norm_silu_conv(self.norm_out, self.conv_out, x, None)


class Decoder(nnx.Module):
    def __init__(self, config: MoVQConfig, **kwargs):
        widths = config.block_out_channels[::-1]
        last = len(widths) - 1
        norm = functools.partial(SpatialNorm, latent_channels=config.latent_channels)
        self.conv_in = conv(config.latent_channels, widths[0], 3, **kwargs)
        self.mid_block = MidBlock(widths[0], norm, **kwargs)
        self.up_blocks = nnx.List(
            DecoderLevel(
                widths[max(i - 1, 0)],
                width,
                config,
                attention=i == 0,
                last=i == last,
                **kwargs,
            )
            for i, width in enumerate(widths)
        )
        self.norm_out = norm(widths[-1], **kwargs)
        self.conv_out = conv(widths[-1], config.out_channels, 3, **kwargs)

    @jax.named_scope("decoder")
    def __call__(self, x: jax.Array, latents: jax.Array, strips: int = 1) -> jax.Array:
        """Two maps (b, h, w, 4) -> (b, 8h, 8w, 3); between them `strips` of each map."""
        x, latents = into_strips(self.conv_in(x), strips), into_strips(latents, strips)
        x = self.mid_block(x, latents, strips)
        for level in self.up_blocks:
            x = level(x, latents, strips)
        return out_of_strips(
            norm_silu_conv(self.norm_out, self.conv_out, x, latents, strips), strips
        )


def normalize(images: jax.Array) -> jax.Array:
    """Images uint8 (b, h, w, 3) -> float32 in [-1, 1], as `MoVQ.encode` takes them."""
    return images.astype(jnp.float32) / 127.5 - 1


class MoVQ(nnx.Module):
    def __init__(self, config: MoVQConfig, *, dtype, param_dtype, rngs):
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config, self.dtype = config, dtype
        self.encoder = Encoder(config, **kwargs)
        self.quant_conv = conv(config.latent_channels, config.vq_embed_dim, 1, **kwargs)
        # Only carried, so that a diffusers checkpoint comes back whole; nothing reads it.
        self.codebook = (
            nnx.Embed(
                config.num_vq_embeddings,
                config.vq_embed_dim,
                embedding_metadata=axes(None, None),
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )
            if config.num_vq_embeddings
            else None
        )
        self.post_quant_conv = conv(config.vq_embed_dim, config.latent_channels, 1, **kwargs)
        self.decoder = Decoder(config, **kwargs)

    def encode(self, images: jax.Array) -> jax.Array:
        """Images in [-1, 1], (b, h, w, 3) -> latents, float32 (b, h/8, w/8, 4)."""
        return self.quant_conv(self.encoder(images.astype(self.dtype))).astype(jnp.float32)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents (b, h/8, w/8, 4) -> images, about [-1, 1], not clipped, float32 (b, h, w, 3)."""
        latents = latents.astype(self.dtype)
        decode, strips = self.decoder, strips_on_tpu(latents)
        if strips > 1:
            decode = functools.partial(
                jax.lax.platform_dependent,
                tpu=functools.partial(self.decoder, strips=strips),
                default=self.decoder,
            )
        return decode(self.post_quant_conv(latents), latents).astype(jnp.float32)
