# SPDX-License-Identifier: Apache-2.0
"""What the calls of all tasks have in common: texts, sampler, seeds, guidance, checked and paired
with the images that a task is given."""

from collections.abc import Mapping, Sequence

import numpy as np

from k3jax.arguments import whole_number
from k3jax.config import ModelConfig, SamplerName
from k3jax.model.context import PromptEmbeds
from k3jax.pipelines import call_inputs
from k3jax.pipelines.call_inputs import OutputType
from k3jax.pipelines.generation import Loop
from k3jax.pipelines.pipeline import BasePipeline
from k3jax.pipelines.rows import ImageRows, image_rows
from k3jax.sampling.denoise import sample_keys


class Call:
    """A call whose arguments are good; nothing has been computed.

    Attributes:
        num_inputs: how many prompts, or pairs of prompt and image, there are.
        count: how many images it makes: `num_images_per_prompt` of each.
        sampler: all of its steps.
        guided: whether any of its images is.
        guidance_interval: the steps that are; see `Loop`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str | None] | None,
        prompt_embeds: PromptEmbeds | None,
        negative_prompt_embeds: PromptEmbeds | None,
        num_images_per_prompt: int,
        num_inference_steps: int | None,
        guidance_scale: float | Sequence[float] | None,
        sampler: SamplerName | None,
        eta: float | None,
        seed: int | Sequence[int],
        output_type: OutputType,
        loop: Loop,
        inputs: Mapping[str, int] | None = None,
    ):
        """
        Args:
            inputs: how many there are of what comes beside the prompts, by its name.

        Raises:
            ValueError: one sentence on the argument that is wrong.
        """
        call_inputs.check_output_type(output_type)
        settings, self.sampler = call_inputs.chosen_sampler(
            config.sampler, name=sampler, num_inference_steps=num_inference_steps, eta=eta
        )
        if guidance_scale is None:
            guidance_scale = settings.guidance_scale
        loop.check(self.sampler)
        self.guidance_interval = loop.guidance_interval

        inputs = dict(inputs or {})
        self._embeds = (prompt_embeds, negative_prompt_embeds)
        if prompt is not None and prompt_embeds is None and max(inputs.values(), default=1) > 1:
            prompt = call_inputs.prompt_list(prompt)
            if len(prompt) == 1:
                prompt = prompt * call_inputs.paired(inputs)
        texts = call_inputs.texts(config, prompt, negative_prompt, *self._embeds)
        self._prompts, self._negatives = texts
        counts = {"prompts": len(self._negatives), **inputs}
        self.num_inputs = call_inputs.paired(counts)
        self.num_images_per_prompt = whole_number(
            num_images_per_prompt, "num_images_per_prompt", least=1
        )
        self._prompt_of = self.image_of(len(self._negatives))
        self.count = len(self._prompt_of)
        self._scales = call_inputs.guidance_scales(guidance_scale, self.count)
        self.guided = self.sampler.guided and bool((self._scales > 0).any())
        self._keys = sample_keys(call_inputs.image_seeds(seed, self.count))

    def image_of(self, count: int) -> np.ndarray:
        """Which of `count` (1, or one per input) each image of the call is made from."""
        return call_inputs.repeated(count, self.num_inputs, self.num_images_per_prompt)

    def images(
        self,
        pipe: BasePipeline,
        latents: np.ndarray | None = None,
        step_noise: np.ndarray | None = None,
    ) -> ImageRows:
        """One row per image, the texts encoded."""
        encoded = self._encoded(pipe)
        return image_rows(self._prompt_of, *encoded, self._scales, self._keys, latents, step_noise)

    def _encoded(self, pipe: BasePipeline):
        """(embeddings, those of the negatives or None, which prompts have a negative).

        Each distinct text is encoded once, prompts and negatives in one go.
        """
        prompt_embeds, negative_embeds = self._embeds
        texts = [*self._prompts, *(n for n in self._negatives if n is not None)]
        texts = list(dict.fromkeys(texts))
        encoded = pipe.encode_prompt(texts) if texts else None
        place = {text: row for row, text in enumerate(texts)}
        if prompt_embeds is None:
            prompt_embeds = encoded[np.array([place[p] for p in self._prompts])]
        has_negative = np.array([n is not None for n in self._negatives])
        if negative_embeds is not None:
            has_negative = np.ones(len(prompt_embeds), bool)
        elif has_negative.any():
            negative_embeds = encoded[np.array([place.get(n, 0) for n in self._negatives])]
        return prompt_embeds, negative_embeds, has_negative
