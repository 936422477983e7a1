# SPDX-License-Identifier: Apache-2.0
"""The loss of a denoising U-Net: mean squared error of the predicted noise (arXiv:2006.11239).

Cosine schedule of 1000 steps, uniform timesteps, captions dropped to the checkpoint's own
unconditional input, as the reference's samplers imply (its training code was never released).
"""

import jax
import jax.numpy as jnp

from k3jax import schedule
from k3jax.config import Conditioning
from k3jax.text_projection import Context, PromptEmbeds, TextProjection
from k3jax.training.config import LossConfig
from k3jax.unet import UNet


def training_context(
    projection: TextProjection,
    prompt: PromptEmbeds,
    conditioning: Conditioning,
    key: jax.Array,
    caption_dropout: float,
) -> Context:
    """The context of captions, of which a share is replaced by the unconditional input.

    A dropped sample keeps its window, as the unconditional half of a guided batch does.
    """
    context = projection(prompt, conditioning)
    if caption_dropout <= 0:
        return context
    rows = prompt.embeds.shape[1]
    unconditional = projection.unconditional(prompt.lengths, rows, conditioning)
    dropped = jax.random.uniform(key, prompt.lengths.shape) < caption_dropout

    def choose(given, empty):
        return jnp.where(dropped.reshape(-1, *(1,) * (given.ndim - 1)), empty, given)

    return jax.tree.map(choose, context, unconditional)


def min_snr_weight(alphas_cumprod: jax.Array, gamma: float) -> jax.Array:
    """min(SNR, gamma) / SNR: the weight of a noise-prediction error (arXiv:2303.09556)."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return jnp.minimum(snr, gamma) / snr


def layout_weight(alphas_cumprod: jax.Array, most: float) -> jax.Array:
    """max(1, min(1 / SNR, most)): a noise-prediction error as an error of the image, where SNR < 1.

    What lies where is decided at high noise, where the error of the noise is that of the image
    times the SNR: next to nothing. (Truncated SNR of arXiv:2202.00512, with a bound.)
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return jnp.clip(1 / snr, 1, most)


def noise_prediction_loss(
    unet: UNet,
    context: Context | None,
    latents: jax.Array,
    key: jax.Array,
    config: LossConfig,
    *,
    extra_channels: jax.Array | None = None,
    weight: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a batch at timesteps and with noise drawn from `key`.

    Args:
        latents: clean, (b, h, w, 4).
        extra_channels: (b, h, w, c) behind the latents' (inpainting: mask and masked latents).
        weight: float32 (b,), of each sample.

    Returns:
        Scalar loss; metric `noise_mse`, the error without any weights.
    """
    key_time, key_noise = jax.random.split(key)
    table = schedule.alphas_cumprod(schedule.cosine_betas(schedule.NUM_TRAIN_TIMESTEPS))
    timesteps = jax.random.randint(key_time, latents.shape[:1], *config.timesteps)
    noise = jax.random.normal(key_noise, latents.shape, jnp.float32)
    a_bar = jnp.asarray(table)[timesteps]
    alpha, sigma = (jnp.sqrt(s)[:, None, None, None] for s in (a_bar, 1 - a_bar))
    noisy = alpha * latents.astype(jnp.float32) + sigma * noise
    if extra_channels is not None:
        noisy = jnp.concatenate([noisy, extra_channels.astype(jnp.float32)], axis=-1)
    error = jnp.square(unet(noisy, timesteps, context) - noise).mean((1, 2, 3))
    total = jnp.ones_like(error) if weight is None else weight
    if config.snr_gamma is not None:
        total = total * min_snr_weight(a_bar, config.snr_gamma)
    if config.layout_weight is not None:
        total = total * layout_weight(a_bar, config.layout_weight)
    return (total * error).mean(), {"noise_mse": error.mean()}
