# SPDX-License-Identifier: Apache-2.0
"""How much of an image is changed: the last steps of a sampler, from the image's noised latents."""

import dataclasses
import math

from k3jax.arguments import check_number
from k3jax.sampling.samplers import Sampler


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
    if sampler.multistep:
        # There is no step before the first one: that is of first order, as diffusers has it.
        rows["second"] = rows["second"].copy()
        rows["second"][0] = 0
    return dataclasses.replace(sampler, rows=rows, first_step=sampler.first_step + first)
