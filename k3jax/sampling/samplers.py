# SPDX-License-Identifier: Apache-2.0
"""The samplers: each is a table of coefficients, one row per step, and a pure step function.

    step(x, output, noise, row, previous) -> (x, prediction)

`x` is the noisy latents, `output` the U-Net's (guided) output, `noise` fresh standard noise (None
for a deterministic sampler), `row` this step's coefficients, `prediction` the image latents that
the step predicts and `previous` those of the step before (zeros at the first). All of it is
float32. The tables are computed in numpy, in the references' order of operations.

A new sampler is one function that returns a `Sampler`, and one row of `SAMPLERS`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from k3jax.arguments import check_number, whole_number
from k3jax.config import PredictionType, SamplerConfig
from k3jax.sampling import schedule


Row = Mapping[str, jax.Array]
Step = Callable[
    [jax.Array, jax.Array, jax.Array | None, Row, jax.Array], tuple[jax.Array, jax.Array]
]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A sampler set up for a number of steps.

    Attributes:
        rows: coefficient name -> float32 (steps,); `timestep` is what the U-Net is given.
        step: the step function; the same object for the same settings, so that jit can cache on it.
        stochastic: whether a step uses noise.
        renoise: whether x is noised to the step's level before the U-Net sees it (Flash).
        guided: False where guidance has no meaning (Flash is distilled without it).
        first_step: which step of the whole schedule the first row is; see `last_steps`.
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


# --- limiting of the predicted image ------------------------------------------------------------


def dynamic_threshold(x0: jax.Array, percentile: float, maximum: float = float("inf")) -> jax.Array:
    """Clips each sample to its own percentile s of |x0| (at least 1, at most `maximum`), over s.

    Imagen (arXiv:2205.11487), section 2.3. x0 is (b, h, w, c).
    """
    s = jnp.quantile(jnp.abs(x0).reshape(x0.shape[0], -1), percentile, axis=1)
    s = jnp.clip(s, 1.0, maximum)[:, None, None, None]
    return jnp.clip(x0, -s, s) / s


def _diffusers_limit(config: SamplerConfig, clip: bool) -> Callable[[jax.Array], jax.Array]:
    if config.thresholding:
        return lambda x0: dynamic_threshold(
            x0, config.dynamic_thresholding_ratio, config.sample_max_value
        )
    if clip and config.clip_sample:
        return lambda x0: jnp.clip(x0, -config.clip_sample_range, config.clip_sample_range)
    return lambda x0: x0


def predicted_image(prediction_type: PredictionType, x, output, row):
    """x0 from what the U-Net predicts, at signal level `alpha` and noise level `sigma`."""
    if prediction_type == "sample":
        return output
    if prediction_type == "v_prediction":
        return row["alpha"] * x - row["sigma"] * output
    return (x - row["sigma"] * output) / row["alpha"]


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
    return Sampler(rows, _kandinsky_step(config.threshold_percentile), stochastic=config.eta > 0)


@functools.cache
def _kandinsky_step(percentile):
    def step(x, output, noise, row, previous):
        x0 = (x - row["sigma"] * output) / row["alpha"]
        x0 = dynamic_threshold(x0, percentile)
        epsilon = (x - row["alpha"] * x0) / row["sigma"]
        x = row["alpha_prev"] * x0 + row["direction"] * epsilon
        return (x if noise is None else x + row["noise"] * noise), x0

    return step


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
    return Sampler(rows, _kandinsky30_step(config.threshold_percentile))


@functools.cache
def _kandinsky30_step(percentile):
    def step(x, output, noise, row, previous):
        x0 = (x - row["sigma"] * output) / row["alpha"]
        x0 = dynamic_threshold(x0, percentile)
        return row["from_x0"] * x0 + row["from_x"] * x + row["noise"] * noise, x0

    return step


def _flash(config: SamplerConfig) -> Sampler:
    """Kandinsky 3.1 Flash: predict the image, noise it to the next level; four times.

    The number of steps is the model's, not the caller's. Source: model/diffusion.py, gan=True.
    """
    timesteps = np.asarray(schedule.FLASH_TIMESTEPS)
    a = schedule.alphas_cumprod(schedule.cosine_betas(schedule.NUM_TRAIN_TIMESTEPS))[timesteps]
    rows = _table(timestep=timesteps, alpha=np.sqrt(a), sigma=np.sqrt(1 - a))
    return Sampler(rows, _flash_step, renoise=True, guided=False)


def _flash_step(x, output, noise, row, previous):
    x0 = (x - row["sigma"] * output) / row["alpha"]
    return x0, x0


# --- diffusers' schedulers ----------------------------------------------------------------------


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
    return Sampler(rows, _ddpm_step(_step_settings(config)))


@functools.cache
def _ddpm_step(config):
    limit = _diffusers_limit(config, clip=True)

    def step(x, output, noise, row, previous):
        x0 = limit(predicted_image(config.prediction_type, x, output, row))
        return row["from_x0"] * x0 + row["from_x"] * x + row["noise"] * noise, x0

    return step


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
    return Sampler(rows, _ddim_step(_step_settings(config)), stochastic=config.eta > 0)


@functools.cache
def _ddim_step(config):
    limit = _diffusers_limit(config, clip=True)

    def step(x, output, noise, row, previous):
        x0 = predicted_image(config.prediction_type, x, output, row)
        epsilon = (x - row["alpha"] * x0) / row["sigma"]  # of the unlimited image
        x0 = limit(x0)
        x = row["alpha_prev"] * x0 + row["direction"] * epsilon
        return (x if noise is None else x + row["noise"] * noise), x0

    return step


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
    return Sampler(rows, _dpm_step(_step_settings(config)), stochastic=False)


@functools.cache
def _dpm_step(config):
    limit = _diffusers_limit(config, clip=False)

    def step(x, output, noise, row, previous):
        x0 = limit(predicted_image(config.prediction_type, x, output, row))
        x = row["ratio"] * x + row["gain"] * x0 + row["second"] * (x0 - previous)
        return x, x0

    return step


def _step_settings(config: SamplerConfig) -> SamplerConfig:
    """The config without what only goes into the tables, so that equal steps are one object."""
    return dataclasses.replace(
        config, num_inference_steps=1, guidance_scale=0.0, eta=0.0, threshold_percentile=1.0
    )


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
    """How many of `num_steps` are made, as diffusers counts; 0 only for strength 0.

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
    """The smallest strength that makes a step, rounded up to 4 digits."""
    return math.ceil(10_000 / num_steps) / 10_000


def last_steps(sampler: Sampler, count: int) -> Sampler:
    """The sampler that makes only the last `count` (1 or more) steps."""
    first = sampler.num_steps - count
    rows = {name: column[first:] for name, column in sampler.rows.items()}
    if "second" in rows:  # multistep
        # There is no step before the first one: that is of first order, as diffusers has it.
        rows["second"] = rows["second"].copy()
        rows["second"][0] = 0
    return dataclasses.replace(sampler, rows=rows, first_step=sampler.first_step + first)
