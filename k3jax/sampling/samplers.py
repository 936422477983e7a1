# SPDX-License-Identifier: Apache-2.0
"""The samplers: each is a table of coefficients, one row per step, and a step of steps.py.

The tables are computed in numpy, in the references' order of operations. A new sampler is one
function that returns a `Sampler`, and one row of `SAMPLERS`.
"""

import dataclasses
import math

import numpy as np

from k3jax.arguments import check_number, whole_number
from k3jax.config import SamplerConfig
from k3jax.sampling import schedule
from k3jax.sampling.steps import (
    ImagePrediction,
    Step,
    ancestral_step,
    ddim_step,
    dpm_step,
    image_step,
    kandinsky_step,
)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A sampler set up for a number of steps.

    Attributes:
        rows: coefficient name -> float32 (steps,); `timestep` is the U-Net's input.
        step: the step function.
        stochastic: whether a step uses noise.
        renoise: whether x is noised to the step's level before the U-Net sees it (Flash).
        guided: False where guidance has no meaning (Flash is distilled without it).
        first_step: number of the first row in the whole schedule; see `last_steps`.
    """

    rows: dict[str, np.ndarray]
    step: Step
    stochastic: bool = True
    renoise: bool = False
    guided: bool = True
    first_step: int = 0

    @property
    def num_steps(self) -> int:
        return len(self.rows["timestep"])


def make_sampler(config: SamplerConfig) -> Sampler:
    """The sampler a config describes.

    Raises:
        ValueError: a number of steps or an eta that the sampler does not have.
    """
    steps = whole_number(config.num_inference_steps, "num_inference_steps")
    limit = schedule.NUM_TRAIN_TIMESTEPS
    if not 1 <= steps <= limit:
        raise ValueError(f"num_inference_steps is {steps}; it must be between 1 and {limit}.")
    if not 0 <= check_number(config.eta, "eta") <= 1:
        raise ValueError(f"eta is {config.eta}; it must be between 0 and 1.")
    return SAMPLERS[config.name](dataclasses.replace(config, num_inference_steps=steps))


def _table(**columns) -> dict[str, np.ndarray]:
    return {name: np.asarray(column, np.float32) for name, column in columns.items()}


# --- Kandinsky's own ----------------------------------------------------------------------------


def _kandinsky(config: SamplerConfig) -> Sampler:
    """DDIM-like sampler of Kandinsky 3.1, with eta under the root and a dynamic threshold.

    The last step goes to alphas_cumprod[0], not to 1, and adds no noise although the share of the
    noise is taken off. Source: ai-forever/Kandinsky-3, model/diffusion.py.
    """
    a_bar = schedule.alphas_cumprod(schedule.cosine_betas(schedule.NUM_TRAIN_TIMESTEPS))
    timesteps = schedule.kandinsky_timesteps(config.num_inference_steps)
    previous = np.append(timesteps[1:], 0)
    a, a_prev = a_bar[timesteps], a_bar[previous]
    sigma = np.sqrt(np.float32(config.eta) * (1 - a / a_prev) * (1 - a_prev) / (1 - a))
    rows = _table(
        timestep=timesteps,
        alpha=np.sqrt(a),
        sigma=np.sqrt(1 - a),
        alpha_prev=np.sqrt(a_prev),
        direction=np.sqrt(np.maximum(1 - a_prev - sigma**2, 0)),
        noise=np.where(previous == 0, 0, sigma),
    )
    image = ImagePrediction(percentile=config.threshold_percentile)
    return Sampler(rows, Step(kandinsky_step, image), stochastic=config.eta > 0)


def _kandinsky30(config: SamplerConfig) -> Sampler:
    """Ancestral sampler of Kandinsky 3.0: every step of a cosine chain of only that many steps.

    Source: ai-forever/Kandinsky-3 at the 3.0 release, model/diffusion.py.
    """
    n = config.num_inference_steps
    if n < 2:
        raise ValueError("the kandinsky30 sampler needs at least 2 steps.")
    betas = schedule.cosine_betas(n)
    a_bar = schedule.alphas_cumprod(betas)
    a_prev = np.append(np.float32(1), a_bar[:-1])
    variance = betas * (1 - a_prev) / (1 - a_bar)
    std = np.exp(np.float32(0.5) * np.log(np.append(variance[1], variance[1:])))
    std[0] = 0  # no noise at the last step
    chain = _table(
        timestep=np.arange(n) * (schedule.NUM_TRAIN_TIMESTEPS // n),
        alpha=np.sqrt(a_bar),
        sigma=np.sqrt(1 - a_bar),
        from_x0=np.sqrt(a_prev) * betas / (1 - a_bar),
        from_x=np.sqrt(1 - betas) * (1 - a_prev) / (1 - a_bar),
        noise=std,
    )
    rows = {name: column[::-1].copy() for name, column in chain.items()}
    image = ImagePrediction(percentile=config.threshold_percentile)
    return Sampler(rows, Step(ancestral_step, image))


def _flash(config: SamplerConfig) -> Sampler:
    """Kandinsky 3.1 Flash: predict the image, noise it to the next level; four times.

    The number of steps is the model's, not the caller's. Source: model/diffusion.py, gan=True.
    """
    timesteps = np.asarray(schedule.FLASH_TIMESTEPS)
    a = schedule.alphas_cumprod(schedule.cosine_betas(schedule.NUM_TRAIN_TIMESTEPS))[timesteps]
    rows = _table(timestep=timesteps, alpha=np.sqrt(a), sigma=np.sqrt(1 - a))
    return Sampler(rows, Step(image_step, ImagePrediction()), renoise=True, guided=False)


# --- diffusers' schedulers ----------------------------------------------------------------------


def _diffusers_prediction(config: SamplerConfig, clip: bool) -> ImagePrediction:
    if config.thresholding:
        ratio, maximum = config.dynamic_thresholding_ratio, config.sample_max_value
        return ImagePrediction(config.prediction_type, ratio, maximum)
    limit = config.clip_sample_range if clip and config.clip_sample else None
    return ImagePrediction(config.prediction_type, clip=limit)


def _ddpm(config: SamplerConfig) -> Sampler:
    """Ancestral sampling as diffusers' DDPMScheduler does it (arXiv:2006.11239, formula 7)."""
    a_bar = schedule.alphas_cumprod(schedule.betas(config))
    timesteps = schedule.diffusers_timesteps(config, config.num_inference_steps)
    a = a_bar[timesteps]
    a_prev = np.append(a[1:], np.float32(1))
    alpha_step = a / a_prev
    beta_step = 1 - alpha_step
    variance = np.maximum((1 - a_prev) / (1 - a) * beta_step, np.float32(1e-20))
    std = {
        "fixed_small": lambda: np.sqrt(variance),
        "fixed_small_log": lambda: np.exp(np.float32(0.5) * np.log(variance)),
        "fixed_large": lambda: np.sqrt(beta_step),
    }.get(config.variance_type)
    if std is None:
        raise ValueError(
            f"sampler.variance_type {config.variance_type!r} is not supported; it must be one of "
            "fixed_small, fixed_small_log, fixed_large."
        )
    rows = _table(
        timestep=timesteps,
        alpha=np.sqrt(a),
        sigma=np.sqrt(1 - a),
        from_x0=np.sqrt(a_prev) * beta_step / (1 - a),
        from_x=np.sqrt(alpha_step) * (1 - a_prev) / (1 - a),
        noise=np.where(timesteps > 0, std(), 0),
    )
    return Sampler(rows, Step(ancestral_step, _diffusers_prediction(config, clip=True)))


def _ddim(config: SamplerConfig) -> Sampler:
    """diffusers' DDIMScheduler (arXiv:2010.02502, formula 12); here eta multiplies sigma.

    Its previous timestep is always t - 1000 // n, whatever the spacing.
    """
    a_bar = schedule.alphas_cumprod(schedule.betas(config))
    timesteps = schedule.diffusers_timesteps(config, config.num_inference_steps)
    previous = timesteps - config.num_train_timesteps // config.num_inference_steps
    final = np.float32(1) if config.set_alpha_to_one else a_bar[0]
    a, a_prev = a_bar[timesteps], np.where(previous >= 0, a_bar[previous], final)
    std = np.float32(config.eta) * np.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))
    rows = _table(
        timestep=timesteps,
        alpha=np.sqrt(a),
        sigma=np.sqrt(1 - a),
        alpha_prev=np.sqrt(a_prev),
        direction=np.sqrt(np.maximum(1 - a_prev - std**2, 0)),
        noise=std,
    )
    image = _diffusers_prediction(config, clip=True)
    return Sampler(rows, Step(ddim_step, image), stochastic=config.eta > 0)


def _dpm_solver(config: SamplerConfig) -> Sampler:
    """DPM-Solver++(2M), midpoint (arXiv:2211.01095), as DPMSolverMultistepScheduler does it.

    First order at the first and the last step; the last step ends at sigma 0.
    """
    a_bar = schedule.alphas_cumprod(schedule.betas(config))
    timesteps = schedule.dpm_timesteps(config, config.num_inference_steps)
    a = np.append(a_bar[timesteps], np.float32(1))
    alpha, sigma = np.sqrt(a), np.sqrt(1 - a)
    with np.errstate(divide="ignore"):
        log_snr = np.log(alpha) - np.log(sigma)
    h = np.diff(log_snr)
    gain = -alpha[1:] * np.expm1(-h)
    second = np.zeros_like(gain)
    second[1:-1] = np.float32(0.5) * gain[1:-1] * h[1:-1] / h[:-2]
    rows = _table(
        timestep=timesteps,
        alpha=alpha[:-1],
        sigma=sigma[:-1],
        ratio=sigma[1:] / sigma[:-1],
        gain=gain,
        second=second,
    )
    image = _diffusers_prediction(config, clip=False)
    return Sampler(rows, Step(dpm_step, image), stochastic=False)


SAMPLERS = {
    "kandinsky": _kandinsky,
    "kandinsky30": _kandinsky30,
    "flash": _flash,
    "ddpm": _ddpm,
    "ddim": _ddim,
    "dpm++2m": _dpm_solver,
}


# --- only the last steps, from an image ---------------------------------------------------------


def steps_of_strength(strength: float, num_steps: int) -> int:
    """How many of `num_steps` run, as diffusers counts them; 0 only for strength 0.

    Raises:
        ValueError: outside of 0 to 1, or so small that no step remains.
    """
    if not 0 <= check_number(strength, "strength") <= 1:
        raise ValueError(f"strength is {strength}; it must be between 0 and 1.")
    steps = min(int(num_steps * strength), num_steps)
    if steps == 0 and strength > 0:
        raise ValueError(
            f"strength {strength} leaves none of {num_steps} steps: give at least "
            f"{least_strength(num_steps)}, or more steps (0 returns the autoencoded image)."
        )
    return steps


def least_strength(num_steps: int) -> float:
    """The smallest strength that leaves a step, rounded up to 4 digits."""
    return math.ceil(10_000 / num_steps) / 10_000


def last_steps(sampler: Sampler, count: int) -> Sampler:
    """The sampler that runs only the last `count` (1 or more) steps."""
    first = sampler.num_steps - count
    rows = {name: column[first:] for name, column in sampler.rows.items()}
    if "second" in rows:  # multistep
        # There is no step before the first one: that is of first order, as diffusers has it.
        rows["second"] = rows["second"].copy()
        rows["second"][0] = 0
    return dataclasses.replace(sampler, rows=rows, first_step=sampler.first_step + first)
