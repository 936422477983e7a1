# SPDX-License-Identifier: Apache-2.0
"""Text to image: prompt -> tokens -> embeddings -> context -> latents -> images."""

import numpy as np

from k3jax.config import ModelConfig
from k3jax.pipelines.call_inputs import CallInputs, check_size, check_text_to_image
from k3jax.pipelines.generation import make_images
from k3jax.pipelines.memory import check_fits
from k3jax.pipelines.option_fields import takes
from k3jax.pipelines.options import TextToImageOptions
from k3jax.pipelines.pipeline import BasePipeline, Output, output
from k3jax.pipelines.rows import ImageGroup


class Kandinsky3Pipeline(BasePipeline):
    """Text to image with a Kandinsky 3 checkpoint. Argument names are those of diffusers.

    An image is a function of the weights, its prompts, its seed, its size and the sampler settings;
    not of the batch, the mesh, or its place in a call.
    """

    @staticmethod
    def check_config(config: ModelConfig) -> None:
        check_text_to_image(config)

    @takes(TextToImageOptions)
    def __call__(self, options: TextToImageOptions) -> Output:
        """Images of prompts; those of one prompt come one after the other.

        Args:
            OPTIONS

        Raises:
            ValueError: one sentence on the argument that is wrong, before anything is compiled.
            TypeError: an argument that does not exist.
        """
        height, width = check_size(self.config, *options.size(self.config))
        inputs = CallInputs(options, self.config)
        factor = self.config.movq.scale_factor
        shape = (height // factor, width // factor, self.config.movq.latent_channels)
        inputs.check_noise(shape, inputs.sampler.num_steps)
        check_fits(self, [(width, height)], inputs.guided)

        # Everything is checked; from here on it takes time.
        group = ImageGroup(np.arange(inputs.count), inputs.encode(self), inputs.sampler, shape)
        images = make_images(self, [group], options)
        return output([images[n] for n in range(inputs.count)], options.output_type)
