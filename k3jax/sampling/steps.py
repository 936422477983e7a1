# SPDX-License-Identifier: Apache-2.0
"""The steps of the samplers, as pure functions of float32 arrays.

    step(image, x, output, noise, row, previous) -> (x, prediction)

`image` predicts the image latents, `x` are the noisy latents, `output` is the U-Net's (guided)
output, `noise` fresh standard noise (None for a deterministic sampler), `row` has this step's
coefficients, `prediction` are the image latents that the step predicts, `previous` those of the
step before (zeros at the first).
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from k3jax.config import PredictionType


Row = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class ImagePrediction:
    """How a step predicts the image latents x0 from the U-Net's output, and limits them.

    Attributes:
        kind: what the U-Net predicts.
        percentile: of the dynamic threshold; None: none.
        maximum: the largest dynamic threshold.
        clip: |x0| is clipped to it; None: it is not.
    """

    kind: PredictionType = "epsilon"
    percentile: float | None = None
    maximum: float = float("inf")
    clip: float | None = None

    def __call__(self, x: jax.Array, output: jax.Array, row: Row) -> jax.Array:
        return self.limit(self.unlimited(x, output, row))

    def unlimited(self, x: jax.Array, output: jax.Array, row: Row) -> jax.Array:
        """x0 at signal level `alpha` and noise level `sigma`."""
        if self.kind == "sample":
            return output
        if self.kind == "v_prediction":
            return row["alpha"] * x - row["sigma"] * output
        return (x - row["sigma"] * output) / row["alpha"]

    def limit(self, x0: jax.Array) -> jax.Array:
        if self.percentile is not None:
            return dynamic_threshold(x0, self.percentile, self.maximum)
        return x0 if self.clip is None else jnp.clip(x0, -self.clip, self.clip)


def dynamic_threshold(x0: jax.Array, percentile: float, maximum: float = float("inf")) -> jax.Array:
    """Clips each sample to its own percentile s of |x0| (at least 1, at most `maximum`), over s.

    Imagen (arXiv:2205.11487), section 2.3. x0 is (b, h, w, c).
    """
    s = jnp.quantile(jnp.abs(x0).reshape(x0.shape[0], -1), percentile, axis=1)
    s = jnp.clip(s, 1.0, maximum)[:, None, None, None]
    return jnp.clip(x0, -s, s) / s


@dataclasses.dataclass(frozen=True)
class Step:
    """A step function with its settings. Equal ones are equal for jit, which compiles them once."""

    function: Callable[..., tuple[jax.Array, jax.Array]]
    image: ImagePrediction

    def __call__(self, x, output, noise, row, previous) -> tuple[jax.Array, jax.Array]:
        return self.function(self.image, x, output, noise, row, previous)


def ancestral_step(image, x, output, noise, row, previous):
    """From the posterior of x0 and x (arXiv:2006.11239, formula 7)."""
    x0 = image(x, output, row)
    return row["from_x0"] * x0 + row["from_x"] * x + row["noise"] * noise, x0


def kandinsky_step(image, x, output, noise, row, previous):
    """Like `ddim_step`, with the noise that belongs to the limited image."""
    x0 = image(x, output, row)
    epsilon = (x - row["alpha"] * x0) / row["sigma"]
    return _towards(x0, epsilon, noise, row), x0


def ddim_step(image, x, output, noise, row, previous):
    """Towards the limited image along the noise of the unlimited one (arXiv:2010.02502)."""
    x0 = image.unlimited(x, output, row)
    epsilon = (x - row["alpha"] * x0) / row["sigma"]
    x0 = image.limit(x0)
    return _towards(x0, epsilon, noise, row), x0


def _towards(x0, epsilon, noise, row):
    x = row["alpha_prev"] * x0 + row["direction"] * epsilon
    return x if noise is None else x + row["noise"] * noise


def image_step(image, x, output, noise, row, previous):
    """To the image itself (Flash)."""
    x0 = image(x, output, row)
    return x0, x0


def dpm_step(image, x, output, noise, row, previous):
    """DPM-Solver++(2M), midpoint (arXiv:2211.01095)."""
    x0 = image(x, output, row)
    return row["ratio"] * x + row["gain"] * x0 + row["second"] * (x0 - previous), x0
