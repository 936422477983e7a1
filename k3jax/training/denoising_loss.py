# SPDX-License-Identifier: Apache-2.0
"""The loss of a denoising U-Net: mean squared error of what it predicts (arXiv:2006.11239).

Noise schedule and kind of prediction are those of the checkpoint's sampler; the original's are the
cosine schedule of 1000 steps and the noise. Timesteps are uniform; a share of the captions is
replaced by the checkpoint's own unconditional input. The original's training code is not published;
its samplers imply this.
"""

import jax
import jax.numpy as jnp
import numpy as np

from k3jax.config import ConditioningFamily, PredictionType, SamplerConfig
from k3jax.model.context import Context, PromptEmbeds, TextProjection
from k3jax.model.unet import UNet
from k3jax.sampling import schedule
from k3jax.training.train_config import LossConfig


def training_context(
    projection: TextProjection,
    prompt: PromptEmbeds,
    conditioning: ConditioningFamily,
    key: jax.Array,
    caption_dropout: float,
) -> Context:
    """The context of captions; a share of them is replaced by the unconditional input.

    A dropped sample keeps its window, like the unconditional half of a guided batch.
    """
    context = projection(prompt, conditioning)
    if caption_dropout <= 0:
        return context
    rows = prompt.embeds.shape[1]
    unconditional = projection.unconditional(prompt.lengths, rows, conditioning)
    dropped = jax.random.uniform(key, prompt.lengths.shape) < caption_dropout

    def choose(caption, empty):
        return jnp.where(dropped.reshape(-1, *(1,) * (caption.ndim - 1)), empty, caption)

    return jax.tree.map(choose, context, unconditional)


def noise_schedule(sampler: SamplerConfig) -> tuple[np.ndarray, PredictionType]:
    """(alphas_cumprod of every timestep, kind of prediction) of a checkpoint's sampler.

    Only diffusers' samplers read the scheduler's settings; Kandinsky's own have one schedule.

    Raises:
        ValueError: an unknown schedule of betas.
    """
    if sampler.name in ("ddpm", "ddim", "dpm++2m"):
        return schedule.alphas_cumprod(schedule.betas(sampler)), sampler.prediction_type
    betas = schedule.cosine_betas(schedule.NUM_TRAIN_TIMESTEPS)
    return schedule.alphas_cumprod(betas), "epsilon"


def check_loss(config: LossConfig, sampler: SamplerConfig) -> None:
    """Checks the timesteps that are trained against the checkpoint's schedule.

    Raises:
        ValueError: timesteps outside of the schedule, or settings that contradict each other.
    """
    own = sampler.name in ("kandinsky", "kandinsky30", "flash")
    table, kind = noise_schedule(sampler)
    if own and sampler.prediction_type != kind:
        raise ValueError(
            f"the checkpoint's sampler is {sampler.name}, whose U-Net predicts the noise, but its "
            f"prediction_type is {sampler.prediction_type}: set the checkpoint's sampler.name to "
            "ddpm or ddim, or its prediction_type to epsilon."
        )
    if own and sampler.beta_schedule != "squaredcos_cap_v2":
        raise ValueError(
            f"the checkpoint's sampler is {sampler.name}, which has the cosine schedule, but its "
            f"beta_schedule is {sampler.beta_schedule}: set the checkpoint's sampler.name to ddpm "
            "or ddim, or its beta_schedule to squaredcos_cap_v2."
        )
    first, end = config.timesteps
    if not 0 <= first < end <= len(table):
        raise ValueError(
            f"train.loss.timesteps is ({first}, {end}): give the first timestep and the one after "
            f"the last, within 0 and {len(table)}."
        )


def min_snr_weight(alphas_cumprod: jax.Array, gamma: float) -> jax.Array:
    """min(SNR, gamma) / SNR: the weight of a noise-prediction error (arXiv:2303.09556)."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return jnp.minimum(snr, gamma) / snr


def layout_weight(alphas_cumprod: jax.Array, most: float) -> jax.Array:
    """max(1, min(1 / SNR, most)): turns a noise error into an error of the image, where SNR < 1.

    The layout is decided at high noise, where the error of the noise is that of the image times the
    SNR: almost zero. (Truncated SNR of arXiv:2202.00512, with an upper bound.)
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return jnp.clip(1 / snr, 1, most)


def as_noise_error(alphas_cumprod: jax.Array, kind: PredictionType) -> jax.Array:
    """The factor from the squared error of a prediction to that of the noise that it implies.

    1; the SNR for `sample`; alpha^2 for v = alpha noise - sigma image. Times `min_snr_weight` these
    are the published min-SNR weights: min(SNR, gamma) for `sample`, and min(SNR, gamma) / (SNR + 1)
    for `v_prediction`.
    """
    if kind == "sample":
        return alphas_cumprod / (1 - alphas_cumprod)
    return alphas_cumprod if kind == "v_prediction" else jnp.ones_like(alphas_cumprod)


def denoising_loss(
    unet: UNet,
    context: Context | None,
    latents: jax.Array,
    key: jax.Array,
    config: LossConfig,
    sampler: SamplerConfig,
    *,
    extra_channels: jax.Array | None = None,
    weight: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a batch at timesteps and with noise drawn from `key`.

    Without weights it is the mean squared error of the prediction. The weights of `config` apply to
    the noise error, so they mean the same for every kind of prediction.

    Args:
        latents: clean, (b, h, w, 4).
        sampler: of the checkpoint.
        extra_channels: (b, h, w, c), follow the latents (inpainting: mask and masked latents).
        weight: float32 (b,), of each sample.

    Returns:
        Scalar loss; metric `noise_mse`, the error of the noise without any weights.
    """
    key_time, key_noise = jax.random.split(key)
    table, kind = noise_schedule(sampler)
    timesteps = jax.random.randint(key_time, latents.shape[:1], *config.timesteps)
    noise = jax.random.normal(key_noise, latents.shape, jnp.float32)
    a_bar = jnp.asarray(table)[timesteps]
    alpha, sigma = (jnp.sqrt(s)[:, None, None, None] for s in (a_bar, 1 - a_bar))
    latents = latents.astype(jnp.float32)
    noisy = alpha * latents + sigma * noise
    target = {
        "epsilon": noise,
        "sample": latents,
        "v_prediction": alpha * noise - sigma * latents,
    }[kind]
    if extra_channels is not None:
        noisy = jnp.concatenate([noisy, extra_channels.astype(jnp.float32)], axis=-1)
    error = jnp.square(unet(noisy, timesteps, context) - target).mean((1, 2, 3))
    of_noise = as_noise_error(a_bar, kind)
    total = jnp.ones_like(error) if weight is None else weight
    if config.snr_gamma is not None or config.layout_weight is not None:
        total = total * of_noise
    if config.snr_gamma is not None:
        total = total * min_snr_weight(a_bar, config.snr_gamma)
    if config.layout_weight is not None:
        total = total * layout_weight(a_bar, config.layout_weight)
    return (total * error).mean(), {"noise_mse": (of_noise * error).mean()}
