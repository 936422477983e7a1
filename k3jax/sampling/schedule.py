# SPDX-License-Identifier: Apache-2.0
"""Noise schedules and lists of timesteps, as numpy tables, computed before anything is traced.

`alphas_cumprod[t]` is the share of the signal's variance left at time t of 0..999.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np

from k3jax.config import SamplerConfig


NUM_TRAIN_TIMESTEPS = 1000
FLASH_TIMESTEPS = (979, 729, 479, 229)


def cosine_betas(num_timesteps: int) -> np.ndarray:
    """The cosine schedule of arXiv:2102.09672, betas capped at 0.999; float32 (num_timesteps,)."""

    def alpha_bar(t):
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    steps = [i / num_timesteps for i in range(num_timesteps + 1)]
    betas = [min(1 - alpha_bar(b) / alpha_bar(a), 0.999) for a, b in itertools.pairwise(steps)]
    return np.asarray(betas, np.float32)


def betas(config: SamplerConfig) -> np.ndarray:
    """The betas a diffusers scheduler config names; float32 (num_train_timesteps,)."""
    n = config.num_train_timesteps
    if config.beta_schedule == "squaredcos_cap_v2":
        return cosine_betas(n)
    if config.beta_schedule == "linear":
        return np.linspace(config.beta_start, config.beta_end, n, dtype=np.float32)
    if config.beta_schedule == "scaled_linear":
        return np.linspace(config.beta_start**0.5, config.beta_end**0.5, n, dtype=np.float32) ** 2
    raise ValueError(
        f"sampler.beta_schedule {config.beta_schedule!r} is not known; it must be one of "
        "squaredcos_cap_v2, linear, scaled_linear."
    )


def alphas_cumprod(betas: np.ndarray) -> np.ndarray:
    """Cumulative product of 1 - betas, float32, accumulated in float64 as torch.cumprod does."""
    return np.cumprod(np.float32(1) - betas, dtype=np.float64).astype(np.float32)


def kandinsky_timesteps(num_inference_steps: int) -> np.ndarray:
    """Timesteps of the original 3.1 sampler: range(999, 0, -1000 // n).

    Python's floor of the negative number gives strides of ceil(1000 / n), so the list can be
    shorter than asked: 300 gives 250 steps. Source: t2i_pipeline.py.
    """
    return np.arange(NUM_TRAIN_TIMESTEPS - 1, 0, -NUM_TRAIN_TIMESTEPS // num_inference_steps)


def diffusers_timesteps(config: SamplerConfig, num_inference_steps: int) -> np.ndarray:
    """Timesteps of DDPMScheduler and DDIMScheduler, int64 (n,), falling."""
    total = config.num_train_timesteps

    def timesteps(n: int) -> np.ndarray:
        if config.timestep_spacing == "leading":
            return np.arange(n)[::-1] * (total // n) + config.steps_offset
        if config.timestep_spacing == "trailing":
            return _trailing(total, n)
        return np.linspace(0, total - 1, n).round()[::-1].astype(np.int64)

    return _checked(timesteps, num_inference_steps, config)


def dpm_timesteps(config: SamplerConfig, num_inference_steps: int) -> np.ndarray:
    """Timesteps of DPMSolverMultistepScheduler, which leaves room for the end point; int64 (n,)."""
    total = config.num_train_timesteps

    def timesteps(n: int) -> np.ndarray:
        if config.timestep_spacing == "leading":
            return np.arange(n + 1)[:0:-1] * (total // (n + 1)) + config.steps_offset
        if config.timestep_spacing == "trailing":
            return _trailing(total, n)
        return np.linspace(0, total - 1, n + 1).round()[:0:-1].astype(np.int64)

    return _checked(timesteps, num_inference_steps, config)


def _trailing(total: int, n: int) -> np.ndarray:
    # For some n (499, 998) the range has n + 1 values, because of rounding; diffusers then runs
    # one step more, at time -1.
    return np.round(np.arange(total, 0, -total / n)).astype(np.int64)[:n] - 1


def _checked(timesteps: Callable[[int], np.ndarray], n: int, config: SamplerConfig) -> np.ndarray:
    """`timesteps(n)`, if they fall at every step and are in the schedule."""

    def fit(times: np.ndarray) -> bool:
        return (
            times[0] < config.num_train_timesteps and times[-1] >= 0 and (np.diff(times) < 0).all()
        )

    times = timesteps(n)
    if fit(times):
        return times
    most = next((fewer for fewer in range(n - 1, 0, -1) if fit(timesteps(fewer))), None)
    advice = "" if most is None else f" ({most} is the most below that)"
    raise ValueError(
        f"num_inference_steps is {n}, which does not fit the {config.num_train_timesteps} "
        f"timesteps of the schedule (timestep_spacing {config.timestep_spacing}, steps_offset "
        f"{config.steps_offset}): ask for fewer steps{advice}."
    )
