# SPDX-License-Identifier: Apache-2.0
"""Image to image: an image's latents, noised to a level, and the steps from there.

With a Flash checkpoint this refines: strength 0.25 is its last step alone (t = 229), 0.5 the last
two, as the 3.1 release and KandiSuperRes use it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from k3jax.config import ModelConfig, SamplerName
from k3jax.images.reading import read_images
from k3jax.model.context import PromptEmbeds
from k3jax.pipelines import call_inputs
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
    to_work_size,
    work_sizes,
)
from k3jax.pipelines.memory import check_room
from k3jax.pipelines.pipeline import BasePipeline, Output, output
from k3jax.pipelines.rows import ImageGroup


class Kandinsky3Img2ImgPipeline(BasePipeline):
    """Image to image with a base or Flash checkpoint. Argument names are those of diffusers.

    What an image is a function of is as for `Kandinsky3Pipeline`, with the image and the strength
    besides; in particular every image has noise of its own.
    """

    @staticmethod
    def check_config(config: ModelConfig) -> None:
        call_inputs.check_text_to_image(config, "image to image")

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        strength: float | Sequence[float] = 0.3,
        num_inference_steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        negative_prompt: str | Sequence[str | None] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] = 0,
        sampler: SamplerName | None = None,
        eta: float | None = None,
        guidance_interval: tuple[int, int] | None = None,
        max_area: int | None = None,
        image_latents: np.ndarray | None = None,
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
            strength: how much is changed, 0 to 1, one for all or one each: of n steps the last
                int(n * strength) are made. 0 returns the autoencoded image.
            guidance_interval: numbers of the whole schedule's n steps, also of those not made.
            max_area: pixels beyond which images are worked on smaller; as many as an image of the
                checkpoint's own size has (1024 x 1024) by default.
            image_latents: (b, h/8, w/8, 4) in the place of `image`, as `output_type="latent"` gives
                them: a second checkpoint can refine what a first one made.
            latents: (b, h/8, w/8, 4) instead of the drawn noise that is laid over the image.
            step_noise: (steps that are made, b, h/8, w/8, 4) instead of what is drawn.

        The other arguments are those of `Kandinsky3Pipeline`.

        Raises:
            ValueError: one sentence on the argument that is wrong, before anything is compiled.
        """
        if (image is None) == (image_latents is None):
            raise ValueError("give image, or image_latents in its place.")
        images, given = None, image_latents
        if image is not None:
            images = read_images(image)
            sizes = work_sizes(self.config, images, max_area)
        else:
            given = call_inputs.check_latents(given, self.config, "image_latents")
            sizes = self._sizes_of_latents(given)
        number = len(sizes)
        loop = Loop(guidance_interval, callback, callback_steps, progress_bar)
        inputs = {"images": number}
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
        image_of = call.image_of(number)
        sizes = [sizes[0]] * call.num_inputs if number == 1 else sizes
        steps = step_counts(call, strengths(strength, call.num_inputs))
        check_given_noise(call, latents, step_noise, sizes, steps, self.config)
        check_room(self, [s for s, n in zip(sizes, steps, strict=True) if n], call.guided)

        # Everything is checked; from here on it takes time.
        everything = call.images(self, latents, step_noise) if any(steps) else None
        parts, made = [], {}
        for size, part, index in groups(call, sizes, steps):
            start = self._start(images, given, image_of[index], size)
            if part is None:
                made |= zip(index.tolist(), self._finished(start, output_type), strict=True)
                continue
            rows = everything.rows(index)
            shape = latent_shape(self.config, size)
            parts.append(ImageGroup(index, rows.starting_from(start), part, shape))
        made |= make_images(self, parts, loop, output_type)
        results = [made[n] for n in range(call.count)]
        if images is not None and output_type != "latent":
            results = [to_own_size(x, images[i]) for x, i in zip(results, image_of, strict=True)]
        return output(results, output_type)

    def _start(self, images, given, image_of: np.ndarray, size) -> np.ndarray:
        """Latents of the images of a group; each distinct image is encoded once."""
        distinct, place = np.unique(image_of, return_inverse=True)
        if images is None:
            return given[image_of]
        arrays = np.stack([to_work_size(images[i], size) for i in distinct])
        return self.encode_arrays(arrays)[place]

    def _finished(self, latents: np.ndarray, output_type: OutputType) -> np.ndarray:
        """Results of strength 0."""
        return latents if output_type == "latent" else self.decode_arrays(latents, output_type)

    def _sizes_of_latents(self, latents: np.ndarray) -> list[tuple[int, int]]:
        factor = self.config.movq.scale_factor
        height, width = (side * factor for side in latents.shape[1:3])
        call_inputs.check_size(self.config, height, width)
        return [(width, height)] * len(latents)
