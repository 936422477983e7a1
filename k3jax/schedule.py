# SPDX-License-Identifier: Apache-2.0
"""Noise schedules and lists of timesteps, as numpy tables made before anything is traced.

`alphas_cumprod[t]` is the share of the signal's variance left at time t of 0..999.
"""

import itertools
import math

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

    Python's floor of the negative number makes strides of ceil(1000 / n), so the list can be
    shorter than asked: 300 gives 250 steps. Source: t2i_pipeline.py.
    """
    return np.arange(NUM_TRAIN_TIMESTEPS - 1, 0, -NUM_TRAIN_TIMESTEPS // num_inference_steps)


def diffusers_timesteps(config: SamplerConfig, num_inference_steps: int) -> np.ndarray:
    """Timesteps of DDPMScheduler and DDIMScheduler, int64 (n,), falling."""
    n, total = num_inference_steps, config.num_train_timesteps
    if config.timestep_spacing == "leading":
        return _inside(np.arange(n)[::-1] * (total // n) + config.steps_offset, config)
    if config.timestep_spacing == "trailing":
        return np.round(np.arange(total, 0, -total / n)).astype(np.int64) - 1
    return np.linspace(0, total - 1, n).round()[::-1].astype(np.int64)


def dpm_timesteps(config: SamplerConfig, num_inference_steps: int) -> np.ndarray:
    """Timesteps of DPMSolverMultistepScheduler, which leaves room for the end point; int64 (n,)."""
    n, total = num_inference_steps, config.num_train_timesteps
    if config.timestep_spacing == "leading":
        return _inside(np.arange(n + 1)[:0:-1] * (total // (n + 1)) + config.steps_offset, config)
    if config.timestep_spacing == "trailing":
        return np.round(np.arange(total, 0, -total / n)).astype(np.int64) - 1
    return np.linspace(0, total - 1, n + 1).round()[:0:-1].astype(np.int64)


def _inside(timesteps: np.ndarray, config: SamplerConfig) -> np.ndarray:
    if timesteps[0] >= config.num_train_timesteps:
        raise ValueError(
            f"{len(timesteps)} steps with steps_offset {config.steps_offset} begin at time "
            f"{timesteps[0]}, but the schedule ends at {config.num_train_timesteps - 1}: "
            "ask for fewer steps."
        )
    return timesteps
