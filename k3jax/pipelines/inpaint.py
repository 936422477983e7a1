# SPDX-License-Identifier: Apache-2.0
"""Inpainting: what a mask covers is painted anew, the rest of the image stays as it is.

Two methods, by what the checkpoint is:

- "model": a U-Net with 9 input channels, trained for it, sees the mask and the latents of the image
  with a grey hole (k3jax/model/inpainting_inputs.py).
- "blend": any other U-Net. Before every step the latents of the known part are put back, noised to
  that step's level; the U-Net is never told that there is a hole. Source of the idea: diffusers,
  pipeline_stable_diffusion_inpaint.py.

Outpainting is inpainting of a larger canvas: `pipe(prompt, *extend_canvas(image, right=256))`.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from k3jax.arguments import check_number
from k3jax.config import ModelConfig, SamplerName
from k3jax.images.compositing import default_feather, generated_share, paste_known
from k3jax.images.reading import read_images, read_masks
from k3jax.model.context import PromptEmbeds
from k3jax.pipelines.call_inputs import OutputType
from k3jax.pipelines.calls import Call
from k3jax.pipelines.generation import Callback, Loop, make_images
from k3jax.pipelines.image_inputs import (
    check_given_noise,
    groups,
    latent_shape,
    step_counts,
    strengths,
    to_own_size,
    work_sizes,
)
from k3jax.pipelines.inpaint_images import Pair, pairs, prepare
from k3jax.pipelines.memory import check_room
from k3jax.pipelines.pipeline import BasePipeline, Output, output
from k3jax.pipelines.rows import ImageGroup


class Kandinsky3InpaintPipeline(BasePipeline):
    """Inpainting with an inpainting checkpoint, or by blending with any other.

    Argument names are those of diffusers. What an image is a function of is as for
    `Kandinsky3Pipeline`, with the image, the mask and the strength besides.
    """

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
        same = self.config.unet.in_channels == self.config.movq.latent_channels
        return "blend" if same else "model"

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float | Sequence[float] = 1.0,
        num_inference_steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        negative_prompt: str | Sequence[str | None] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] = 0,
        sampler: SamplerName | None = None,
        eta: float | None = None,
        guidance_interval: tuple[int, int] | None = None,
        max_area: int | None = None,
        feather: float | None = None,
        paste_back: bool = True,
        latents: np.ndarray | None = None,
        step_noise: np.ndarray | None = None,
        prompt_embeds: PromptEmbeds | None = None,
        negative_prompt_embeds: PromptEmbeds | None = None,
        output_type: OutputType = "pil",
        progress_bar: bool = True,
        callback: Callback | None = None,
        callback_steps: int = 1,
    ) -> Output:
        """Makes images of images; those of one input stand side by side.

        Args:
            prompt: one for all images, or one each; or give `prompt_embeds`.
            image: one for all prompts, or one each, in any sizes: paths, PIL images or arrays, see
                k3jax/images/reading.py. A result has the size of its image.
            mask_image: one for all images, or one each, of the image's size: white, 1 or True is
                repainted. Fractions are given to the model as they are.
            strength: 1 paints from noise; less starts from what lies under the mask, as in
                `Kandinsky3Img2ImgPipeline`.
            max_area: pixels beyond which images are worked on smaller; as many as an image of the
                checkpoint's own size has (1024 x 1024) by default.
            feather: pixels around the mask over which the result fades into the image; by default
                as many as one latent covers (8, or more where the image was made smaller).
            paste_back: put the pixels outside of mask and feather back as they were; False returns
                what the model made of them.

        The other arguments are those of `Kandinsky3Img2ImgPipeline`. With `output_type="latent"`
        nothing is pasted and the size is that which was worked at.

        Raises:
            ValueError: one sentence on the argument that is wrong, before anything is compiled.
        """
        for name, value in (("image", image), ("mask_image", mask_image)):
            if value is None:
                raise ValueError(f"give {name}.")
        images, masks = read_images(image), read_masks(mask_image)
        if feather is not None:
            check_number(feather, "feather", least=0)
        sizes = work_sizes(self.config, images, max_area)
        loop = Loop(guidance_interval, callback, callback_steps, progress_bar)
        inputs = {"images": len(images), "masks": len(masks)}
        if np.ndim(strength):
            inputs["strengths"] = len(strength)
        call = Call(
            self.config,
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            sampler=sampler,
            eta=eta,
            seed=seed,
            output_type=output_type,
            loop=loop,
            inputs=inputs,
        )
        inputs = pairs(images, masks, call.num_inputs)
        sizes = [sizes[0]] * call.num_inputs if len(sizes) == 1 else sizes
        steps = step_counts(call, strengths(strength, call.num_inputs))
        if 0 in steps:
            raise ValueError("strength is 0, which repaints nothing: give more.")
        check_given_noise(call, latents, step_noise, sizes, steps, self.config)
        check_room(self, sizes, call.guided)

        # Everything is checked; from here on it takes time.
        everything = call.images(self, latents, step_noise)
        input_of = call.image_of(call.num_inputs)
        parts = []
        for size, part, index in groups(call, sizes, steps):
            whole = part.num_steps == call.sampler.num_steps
            rows = prepare(self, everything.rows(index), inputs, input_of[index], size, not whole)
            parts.append(ImageGroup(index, rows, part, latent_shape(self.config, size)))
        made = make_images(self, parts, loop, output_type)
        results = [made[n] for n in range(call.count)]
        if output_type != "latent":
            results = [
                self._result(result, inputs[i], sizes[i], feather, paste_back)
                for result, i in zip(results, input_of, strict=True)
            ]
        return output(results, output_type)

    def _result(
        self,
        made: np.ndarray,
        given: Pair,
        size: tuple[int, int],
        feather: float | None,
        paste_back: bool,
    ) -> np.ndarray:
        """A result in the size of its image, the known pixels put back."""
        made = to_own_size(made, given.image)
        if not paste_back:
            return made
        if feather is None:
            feather = default_feather(given.image.shape, size, self.config.movq.scale_factor)
        return paste_known(made, given.image, generated_share(given.mask, feather))
