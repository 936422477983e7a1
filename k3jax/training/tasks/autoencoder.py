# SPDX-License-Identifier: Apache-2.0
"""MoVQ from scratch: reconstruction through latents that a diffusion model can work with.

MoVQ (arXiv:2209.09002) was trained with a codebook, a perceptual and an adversarial loss. Kandinsky
3 uses its raw latents and never the codebook, and the networks those losses need are not part of
it. Here latents are kept within [-1, 1], where the samplers clip, by a penalty; noise on what the
decoder sees makes the encoder use that range, and makes small errors of a diffusion model harmless.
"""

import jax
import jax.numpy as jnp

from k3jax.model.movq import MoVQ, normalize


LATENT_NOISE = 0.05
"""Standard deviation of the noise on the latents that the decoder sees."""
RANGE_WEIGHT = 10.0
EDGE_WEIGHT = 1.0


def movq_loss(movq: MoVQ, images: jax.Array, key: jax.Array) -> tuple[jax.Array, dict]:
    """The loss of a batch.

    Args:
        images: uint8 (b, h, w, 3).

    Returns:
        Scalar loss; metrics `mse` (of pixels in [-1, 1]), `latent_std`, `latent_outside` (share of
        latents beyond 1).
    """
    target = normalize(images)
    latents = movq.encode(target)
    noise = LATENT_NOISE * jax.random.normal(key, latents.shape)
    output = movq.decode(latents + noise)
    error = output - target
    # Differences of neighbours weigh edges, which cover few pixels, as much as surfaces.
    edges = jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
    outside = jnp.square(jnp.maximum(jnp.abs(latents) - 1, 0)).mean()
    loss = jnp.abs(error).mean() + jnp.square(error).mean()
    loss = loss + EDGE_WEIGHT * edges + RANGE_WEIGHT * outside
    return loss, {
        "mse": jnp.square(error).mean(),
        "latent_std": latents.std(),
        "latent_outside": (jnp.abs(latents) > 1).mean(),
    }


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error of pixels in [-1, 1]."""
    return float(10 * jnp.log10(4 / mse))
