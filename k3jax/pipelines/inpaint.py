# SPDX-License-Identifier: Apache-2.0
"""Inpainting: what a mask covers is painted anew, the rest of the image stays as it is.

Two methods, by what the checkpoint is:

- "model": a U-Net with 9 input channels, trained for it, sees the mask and the latents of the image
  with a grey hole (k3jax/model/inpainting_inputs.py).
- "blend": any other U-Net. Before every step the latents of the known part are put back, noised to
  that step's level; the U-Net does not know the mask. Source of the idea: diffusers,
  pipeline_stable_diffusion_inpaint.py.

Outpainting is inpainting of a larger canvas: `pipe(prompt, *extend_canvas(image, right=256))`.
"""

from typing import Literal

import numpy as np

from k3jax.config import ModelConfig
from k3jax.images.compositing import default_feather, generated_share, paste_known
from k3jax.pipelines.call_inputs import latent_shape
from k3jax.pipelines.generation import make_images
from k3jax.pipelines.image_inputs import InpaintInputs, Pair, inpainting_rows, to_own_size
from k3jax.pipelines.memory import check_fits
from k3jax.pipelines.option_fields import takes
from k3jax.pipelines.options import InpaintOptions
from k3jax.pipelines.pipeline import BasePipeline, Output, output
from k3jax.pipelines.rows import ImageGroup


class Kandinsky3InpaintPipeline(BasePipeline):
    """Inpainting with an inpainting checkpoint, or by blending with any other.

    Argument names are those of diffusers. What an image is a function of is as for
    `Kandinsky3Pipeline`, and also the image, the mask and the strength.
    """

    call_inputs = InpaintInputs

    @staticmethod
    def check_config(config: ModelConfig) -> None:
        latents, found = config.movq.latent_channels, config.unet.in_channels
        if found not in (latents, 2 * latents + 1):
            raise ValueError(
                f"the U-Net takes {found} channels: inpainting knows what {2 * latents + 1} "
                f"(latents, mask, masked latents) and {latents} are."
            )

    @property
    def method(self) -> Literal["model", "blend"]:
        """How this checkpoint inpaints; see the module."""
        return self.method_of(self.config)

    @staticmethod
    def method_of(config: ModelConfig) -> Literal["model", "blend"]:
        """How a checkpoint inpaints, by its config."""
        return "blend" if config.unet.in_channels == config.movq.latent_channels else "model"

    @takes(InpaintOptions)
    def __call__(self, options: InpaintOptions) -> Output:
        """Images with a part painted anew; those of one input come one after the other.

        With `output_type="latent"` nothing is pasted, and the size is that which was worked at.

        Args:
            OPTIONS

        Raises:
            ValueError: one sentence on the argument that is wrong, before anything is compiled.
            TypeError: an argument that does not exist.
        """
        inputs = self.call_inputs(options, self.config)
        check_fits(self, inputs)

        # Everything is checked; from here on it takes time.
        everything = inputs.encode(self)
        groups = []
        for size, sampler, index in inputs.groups():
            whole = sampler.num_steps == inputs.sampler.num_steps
            rows, input_of = everything.rows(index), inputs.input_of[index]
            rows = inpainting_rows(self, rows, inputs.pairs, input_of, size, from_image=not whole)
            groups.append(ImageGroup(index, rows, sampler, latent_shape(self.config, size)))
        results = make_images(self, groups, options)
        results = [results[n] for n in range(inputs.count)]
        if options.output_type != "latent":
            results = [
                self._result(result, inputs.pairs[i], inputs.sizes[i], options)
                for result, i in zip(results, inputs.input_of, strict=True)
            ]
        return output(results, options.output_type)

    def _result(
        self, result: np.ndarray, pair: Pair, size: tuple[int, int], options: InpaintOptions
    ) -> np.ndarray:
        """A result in the size of its image, the known pixels put back."""
        result = to_own_size(result, pair.image)
        if not options.paste_back:
            return result
        feather = options.feather
        if feather is None:
            feather = default_feather(pair.image.shape, size, self.config.movq.scale_factor)
        return paste_known(result, pair.image, generated_share(pair.mask, feather))
