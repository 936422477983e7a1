# SPDX-License-Identifier: Apache-2.0
"""Text to image: prompt -> tokens -> embeddings -> context -> latents -> images."""

from k3jax.config import ModelConfig
from k3jax.pipelines.call_inputs import TextToImageInputs, check_text_to_image, latent_shape
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

    call_inputs = TextToImageInputs

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
        inputs = self.call_inputs(options, self.config)
        check_fits(self, inputs)

        # Everything is checked; from here on it takes time.
        rows = inputs.encode(self)
        groups = [
            ImageGroup(index, rows.rows(index), sampler, latent_shape(self.config, size))
            for size, sampler, index in inputs.groups()
        ]
        images = make_images(self, groups, options)
        return output([images[n] for n in range(inputs.count)], options.output_type)
