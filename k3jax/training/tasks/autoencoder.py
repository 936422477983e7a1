# SPDX-License-Identifier: Apache-2.0
"""The task movq: an autoencoder whose latents suit a diffusion model.

MoVQ (arXiv:2209.09002) was trained with a codebook, a perceptual and an adversarial loss. Kandinsky
3 uses its raw latents and never the codebook, and the networks those losses need are not part of
it. Here latents are kept within [-1, 1], where the samplers clip, by a penalty; noise on what the
decoder sees makes the encoder use that range, and makes small errors of a diffusion model harmless.
"""

import jax
import jax.numpy as jnp
import numpy as np

from k3jax.model.movq import MoVQ, normalize
from k3jax.pipelines.pipeline import BasePipeline
from k3jax.training.data.training_data import open_data
from k3jax.training.sample_grids import MAX_SHOWN, grid, pipeline_of
from k3jax.training.state import with_weights
from k3jax.training.tasks.task import Task
from k3jax.training.train_config import TrainConfig


LATENT_NOISE = 0.05
"""Standard deviation of the noise on the latents that the decoder sees."""
RANGE_WEIGHT = 10.0
EDGE_WEIGHT = 1.0


class Autoencoder(Task):
    """Trains MoVQ, or with `train.decoder_only` the part of it that decodes latents."""

    name = "movq"

    def __init__(self, config, model, base, mesh):
        super().__init__(config, model, base, mesh)
        if config.decoder_only:
            self.fixed = ("movq.encoder.", "movq.quant_conv.")

    @classmethod
    def components(cls, config: TrainConfig) -> tuple[str, ...]:
        if config.from_scratch:
            super().components(config)
        return ("movq",)

    def open_data(self, tokenizer, progress):
        return open_data(self.config, lambda batch, number: {"images": batch["images"]})

    def loss(self, weights, frozen, batch, key):
        weights = {
            name: jax.lax.stop_gradient(value) if name.startswith(self.fixed) else value
            for name, value in weights.items()
        }
        return movq_loss(with_weights(self.trained["movq"], "movq", weights), batch["images"], key)

    def sampler(self, batch, tokenizer):
        """Pairs of an image and its reconstruction."""
        images = batch["images"][:MAX_SHOWN]

        def sample(weights):
            modules = {"movq": with_weights(self.trained["movq"], "movq", weights)}
            pipe = pipeline_of(BasePipeline, self.model, modules, self.mesh, len(images))
            decoded = pipe.decode_arrays(pipe.encode_arrays(images), "pil")
            pairs = np.stack([images, decoded], axis=1)
            return grid(pairs.reshape(-1, *images.shape[1:]), columns=8)

        return sample


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
