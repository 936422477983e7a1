# SPDX-License-Identifier: Apache-2.0
"""Image to image: an image's latents, noised to a level, and the steps from there.

With a Flash checkpoint this refines: strength 0.25 is its last step alone (t = 229), 0.5 the last
two, as the 3.1 release and KandiSuperRes use it.
"""

import numpy as np

from k3jax.config import ModelConfig
from k3jax.images.reading import read_images
from k3jax.pipelines.call_inputs import check_latents, check_size, check_text_to_image
from k3jax.pipelines.generation import make_images
from k3jax.pipelines.image_inputs import (
    ImageInputs,
    latent_shape,
    to_own_size,
    to_work_size,
    work_sizes,
)
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
        if (options.image is None) == (options.image_latents is None):
            raise ValueError("give image, or image_latents instead of it.")
        images = image_latents = None
        if options.image is not None:
            images = read_images(options.image)
            sizes = work_sizes(self.config, images, options.max_area)
        else:
            image_latents = check_latents(options.image_latents, self.config, "image_latents")
            sizes = self._sizes_of_latents(image_latents)
        inputs = ImageInputs(options, self.config, sizes, images=len(sizes))
        image_of = inputs.image_of(len(sizes))
        fitting = [size for size, n in zip(inputs.sizes, inputs.steps, strict=True) if n]
        check_fits(self, fitting, inputs.guided)

        # Everything is checked; from here on it takes time.
        everything = inputs.encode(self) if any(inputs.steps) else None
        parts, results = [], {}
        for size, part, index in inputs.groups():
            start = self._start(images, image_latents, image_of[index], size)
            if part is None:
                finished = self._finished(start, options.output_type)
                results |= zip(index.tolist(), finished, strict=True)
                continue
            rows = everything.rows(index)
            shape = latent_shape(self.config, size)
            parts.append(ImageGroup(index, rows.starting_from(start), part, shape))
        results |= make_images(self, parts, options)
        results = [results[n] for n in range(inputs.count)]
        if images is not None and options.output_type != "latent":
            results = [to_own_size(x, images[i]) for x, i in zip(results, image_of, strict=True)]
        return output(results, options.output_type)

    def _start(self, images, image_latents, image_of: np.ndarray, size) -> np.ndarray:
        """Latents of the images of a group; each distinct image is encoded once."""
        distinct, place = np.unique(image_of, return_inverse=True)
        if images is None:
            return image_latents[image_of]
        arrays = np.stack([to_work_size(images[i], size) for i in distinct])
        return self.encode_arrays(arrays)[place]

    def _finished(self, latents: np.ndarray, output_type: str) -> np.ndarray:
        """Results of strength 0."""
        return latents if output_type == "latent" else self.decode_arrays(latents, output_type)

    def _sizes_of_latents(self, latents: np.ndarray) -> list[tuple[int, int]]:
        factor = self.config.movq.scale_factor
        height, width = (side * factor for side in latents.shape[1:3])
        check_size(self.config, height, width)
        return [(width, height)] * len(latents)
