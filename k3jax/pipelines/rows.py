# SPDX-License-Identifier: Apache-2.0
"""One row per image: the inputs of a call's device programs."""

import dataclasses

import numpy as np

from k3jax.model.context import PromptEmbeds
from k3jax.sampling.samplers import Sampler


@dataclasses.dataclass(frozen=True)
class ImageRows:
    """One row per image: the inputs of the device programs.

    Attributes:
        prompt: embeddings of the prompts.
        negative: of the negative prompts, windows widened to the prompts', or None.
        has_negative: bool (n,).
        guidance_scale: float32 (n,).
        key_data: random keys, uint32 (n, 2).
        latents: initial noise (n, h/8, w/8, 4), or None to draw it.
        step_noise: (steps, n, h/8, w/8, 4), or None.
        start: latents (n, h/8, w/8, 4) of the images that sampling starts from, or None for noise.
        extra_channels: the inpainting U-Net's other inputs (n, h/8, w/8, 5), or None.
        known: latents (n, h/8, w/8, 4) that replace the loop's own at every step, or None.
        known_mask: (n, h/8, w/8, 1), 1 where `known` replaces them.
    """

    prompt: PromptEmbeds
    negative: PromptEmbeds | None
    has_negative: np.ndarray
    guidance_scale: np.ndarray
    key_data: np.ndarray
    latents: np.ndarray | None = None
    step_noise: np.ndarray | None = None
    start: np.ndarray | None = None
    extra_channels: np.ndarray | None = None
    known: np.ndarray | None = None
    known_mask: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.guidance_scale)

    def rows(self, index: np.ndarray) -> "ImageRows":
        """The images at `index`, in that order."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        step_noise = fields.pop("step_noise")
        taken = {name: None if x is None else x[index] for name, x in fields.items()}
        return ImageRows(**taken, step_noise=None if step_noise is None else step_noise[:, index])

    def starting_from(self, latents: np.ndarray) -> "ImageRows":
        """The same with sampling from the latents of images."""
        return dataclasses.replace(self, start=latents)


@dataclasses.dataclass(frozen=True)
class ImageGroup:
    """ImageRows of a call that are of one size and take the same steps.

    Attributes:
        index: which images of the call.
        images: one row for each of them.
        sampler: the steps they take.
        shape: (h/8, w/8, 4) of their latents.
    """

    index: np.ndarray
    images: ImageRows
    sampler: Sampler
    shape: tuple[int, int, int]


def image_rows(
    prompt_of: np.ndarray,
    prompt: PromptEmbeds,
    negative: PromptEmbeds | None,
    has_negative: np.ndarray,
    guidance_scale: np.ndarray,
    key_data: np.ndarray,
    latents: np.ndarray | None,
    step_noise: np.ndarray | None,
) -> ImageRows:
    """One row per image, from one row per prompt and arrays with one row per image."""
    if negative is not None:
        # The references cut a negative to the prompt's window; here the wider window holds for it.
        lengths = np.maximum(negative.lengths, prompt.lengths)
        negative = dataclasses.replace(negative, lengths=lengths)[prompt_of]
    return ImageRows(
        prompt[prompt_of],
        negative,
        has_negative[prompt_of],
        guidance_scale,
        key_data,
        latents,
        step_noise,
    )
