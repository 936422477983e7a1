# SPDX-License-Identifier: Apache-2.0
"""Text to image: prompt -> tokens -> embeddings -> context -> latents -> images."""

from collections.abc import Sequence

import numpy as np

from k3jax.config import ModelConfig, SamplerName
from k3jax.model.context import PromptEmbeds
from k3jax.pipelines import call_inputs
from k3jax.pipelines.call_inputs import OutputType
from k3jax.pipelines.calls import Call
from k3jax.pipelines.generation import Callback, Loop, make_images
from k3jax.pipelines.memory import check_room
from k3jax.pipelines.pipeline import BasePipeline, Output, output
from k3jax.pipelines.rows import ImageGroup


__all__ = ["Kandinsky3Pipeline", "Output"]


class Kandinsky3Pipeline(BasePipeline):
    """Text to image with a Kandinsky 3 checkpoint. Argument names are those of diffusers.

    An image is a function of the weights, its prompts, its seed, its size and the sampler settings;
    not of the batch, the mesh, or its place in a call.
    """

    @staticmethod
    def check_config(config: ModelConfig) -> None:
        call_inputs.check_text_to_image(config)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str | None] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] = 0,
        sampler: SamplerName | None = None,
        eta: float | None = None,
        guidance_interval: tuple[int, int] | None = None,
        latents: np.ndarray | None = None,
        step_noise: np.ndarray | None = None,
        prompt_embeds: PromptEmbeds | None = None,
        negative_prompt_embeds: PromptEmbeds | None = None,
        output_type: OutputType = "pil",
        progress_bar: bool = True,
        callback: Callback | None = None,
        callback_steps: int = 1,
    ) -> Output:
        """Makes images; those of one prompt stand side by side.

        Args:
            prompt: one or several; or give `prompt_embeds` from `encode_prompt`.
            negative_prompt: what to guide away from: one for all prompts, or one (or None) each.
            height, width: pixels, multiples of 64; the checkpoint's own size (1024) by default.
            num_inference_steps, guidance_scale, sampler, eta: the checkpoint's own by default.
                The guided noise is (w + 1) conditional - w unconditional, at any w of 0 or more; 0
                costs one forward pass a step. `guidance_scale` may be one per image.
            num_images_per_prompt: images of each prompt.
            seed: image k gets seed + k; or one seed per image.
            guidance_interval: first and last step, counted from 0, that are guided; the others cost
                one forward pass.
            latents: (b, h/8, w/8, 4) instead of the drawn initial noise.
            step_noise: (steps, b, h/8, w/8, 4) instead of the noise drawn at each step.
            output_type: "pil", "np" or "latent"; see `Output`.
            callback: is given a `k3jax.pipelines.preview.StepPreview` of each batch every
                `callback_steps` steps.

        Raises:
            ValueError: one sentence on the argument that is wrong, before anything is compiled.
        """
        height = self.config.sample_size if height is None else height
        width = self.config.sample_size if width is None else width
        height, width = call_inputs.check_size(self.config, height, width)
        loop = Loop(guidance_interval, callback, callback_steps, progress_bar)
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
        )
        factor = self.config.movq.scale_factor
        shape = (height // factor, width // factor, self.config.movq.latent_channels)
        call_inputs.check_noise(latents, step_noise, shape, call.count, call.sampler.num_steps)
        check_room(self, [(width, height)], call.guided)

        # Everything is checked; from here on it takes time.
        images = call.images(self, latents, step_noise)
        group = ImageGroup(np.arange(call.count), images, call.sampler, shape)
        made = make_images(self, [group], loop, output_type)
        return output([made[n] for n in range(call.count)], output_type)
