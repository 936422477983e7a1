# SPDX-License-Identifier: Apache-2.0
"""Image to image: an image's latents, noised to a level, and the steps from there.

With a Flash checkpoint this refines: strength 0.25 is its last step alone (t = 229), 0.5 the last
two, as the 3.1 release and KandiSuperRes use it.
"""

import numpy as np

from k3jax.config import ModelConfig
from k3jax.pipelines.call_inputs import Size, check_text_to_image, latent_shape
from k3jax.pipelines.generation import make_images
from k3jax.pipelines.image_inputs import ImageToImageInputs, to_own_size, to_work_size
from k3jax.pipelines.memory import check_fits
from k3jax.pipelines.option_fields import takes
from k3jax.pipelines.options import ImageToImageOptions
from k3jax.pipelines.pipeline import BasePipeline, Output, output
from k3jax.pipelines.rows import ImageGroup


class Kandinsky3Img2ImgPipeline(BasePipeline):
    """Image to image with a base or Flash checkpoint. Argument names are those of diffusers.

    What an image is a function of is as for `Kandinsky3Pipeline`, and also the image and the
    strength. Every image has noise of its own.
    """

    call_inputs = ImageToImageInputs

    @staticmethod
    def check_config(config: ModelConfig) -> None:
        check_text_to_image(config, "image to image")

    @takes(ImageToImageOptions)
    def __call__(self, options: ImageToImageOptions) -> Output:
        """Images of images; those of one input come one after the other.

        Args:
            OPTIONS

        Raises:
            ValueError: one sentence on the argument that is wrong, before anything is compiled.
            TypeError: an argument that does not exist.
        """
        inputs = self.call_inputs(options, self.config)
        check_fits(self, inputs)

        # Everything is checked; from here on it takes time.
        rows = inputs.encode(self) if any(inputs.steps) else None
        groups, results = [], {}
        for size, sampler, index in inputs.groups():
            start = self._start(inputs, index, size)
            if sampler is None:
                finished = self._finished(start, options.output_type)
                results |= zip(index.tolist(), finished, strict=True)
                continue
            shape = latent_shape(self.config, size)
            groups.append(ImageGroup(index, rows.rows(index).starting_from(start), sampler, shape))
        results |= make_images(self, groups, options)
        results = [results[n] for n in range(inputs.count)]
        if inputs.images is not None and options.output_type != "latent":
            own = [inputs.images[i] for i in inputs.image_of]
            results = [to_own_size(x, image) for x, image in zip(results, own, strict=True)]
        return output(results, options.output_type)

    def _start(self, inputs: ImageToImageInputs, index: np.ndarray, size: Size) -> np.ndarray:
        """Latents of the images of a group; each distinct image is encoded once."""
        image_of = inputs.image_of[index]
        if inputs.images is None:
            return inputs.image_latents[image_of]
        distinct, place = np.unique(image_of, return_inverse=True)
        arrays = np.stack([to_work_size(inputs.images[i], size) for i in distinct])
        return self.encode_arrays(arrays)[place]

    def _finished(self, latents: np.ndarray, output_type: str) -> np.ndarray:
        """Results of strength 0."""
        return latents if output_type == "latent" else self.decode_arrays(latents, output_type)
