# SPDX-License-Identifier: Apache-2.0
"""What a pipeline call asks for, checked and spread out to one row per image."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from k3jax.config import MAX_TOKENS, ModelConfig, SamplerConfig, SamplerName
from k3jax.text_projection import PromptEmbeds


OutputType = Literal["pil", "np", "latent"]


def check_text_to_image(config: ModelConfig) -> None:
    """Refuses a model that needs an image besides the prompt."""
    if config.unet.in_channels != config.movq.latent_channels:
        raise ValueError(
            f"this is an inpainting checkpoint (its U-Net takes {config.unet.in_channels} "
            f"channels, not {config.movq.latent_channels}): text to image needs a base or "
            "Flash checkpoint."
        )


def check_size(config: ModelConfig, height: int, width: int) -> None:
    """Refuses sizes the U-Net cannot halve at every level but the last; 64 pixels as released."""
    multiple = config.movq.scale_factor * 2 ** (len(config.unet.block_out_channels) - 1)
    for name, size in (("height", height), ("width", width)):
        if not isinstance(size, int | np.integer) or size < multiple or size % multiple:
            near = max(multiple, round(size / multiple) * multiple)
            raise ValueError(
                f"{name} is {size}; it must be a positive multiple of {multiple} "
                f"(the nearest is {near})."
            )


def prompt_list(prompt: str | Sequence[str], name: str = "prompt") -> list[str]:
    """One prompt or several as a list that is not empty."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, Sequence):
        raise ValueError(f"{name} must be a string or a list of strings, not {prompt!r}.")
    if not prompts:
        raise ValueError(f"{name} is an empty list: give at least one.")
    return list(prompts)


def negative_list(negative: str | Sequence[str | None] | None, count: int) -> list[str | None]:
    """One negative prompt per prompt; one string serves all; None: unconditional guidance."""
    if negative is None or isinstance(negative, str):
        return [negative] * count
    negatives = list(negative)
    if len(negatives) != count:
        raise ValueError(
            f"negative_prompt has {len(negatives)} entries for {count} prompts: give one string, "
            "or one entry per prompt."
        )
    return negatives


def texts(
    config: ModelConfig,
    prompt: str | Sequence[str] | None,
    negative_prompt: str | Sequence[str | None] | None,
    prompt_embeds: PromptEmbeds | None,
    negative_embeds: PromptEmbeds | None,
) -> tuple[list[str], list[str | None]]:
    """What is to be encoded: prompts (none where there are embeddings), a negative for each."""
    for name, text, embeds in (
        ("prompt", prompt, prompt_embeds),
        ("negative_prompt", negative_prompt, negative_embeds),
    ):
        if text is not None and embeds is not None:
            raise ValueError(f"give {name} or {name}_embeds, not both.")
        if embeds is not None:
            check_embeds(embeds, config, f"{name}_embeds")
    if prompt is None and prompt_embeds is None:
        raise ValueError("give prompt or prompt_embeds.")
    prompts = [] if prompt is None else prompt_list(prompt)
    count = len(prompts) if prompt_embeds is None else len(prompt_embeds)
    if negative_embeds is not None and len(negative_embeds) != count:
        raise ValueError(
            f"negative_prompt_embeds has {len(negative_embeds)} rows for {count} prompts."
        )
    return prompts, negative_list(negative_prompt, count)


def image_seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """One seed per image: `seed + k` for image k, or those given."""
    seeds = [seed + k for k in range(count)] if isinstance(seed, int | np.integer) else list(seed)
    if len(seeds) != count:
        raise ValueError(f"seed has {len(seeds)} entries for {count} images.")
    return [int(s) for s in seeds]


def guidance_scales(guidance_scale: float | Sequence[float], count: int) -> np.ndarray:
    """w of each image, float32 (count,)."""
    scales = np.asarray(guidance_scale, np.float32)
    if scales.shape not in ((), (count,)):
        raise ValueError(f"guidance_scale has shape {scales.shape} for {count} images.")
    if not np.isfinite(scales).all() or (scales < 0).any():
        raise ValueError(f"guidance_scale is {guidance_scale}; it must be 0 or more.")
    return np.broadcast_to(scales, (count,))


def override(defaults: SamplerConfig, **given) -> SamplerConfig:
    """The checkpoint's sampler settings with those of the call; None leaves the default."""
    name = given.get("name")
    if name is not None and name not in get_args(SamplerName):
        known = ", ".join(get_args(SamplerName))
        raise ValueError(f"sampler {name!r} is not one of {known}.")
    return dataclasses.replace(defaults, **{k: v for k, v in given.items() if v is not None})


def check_noise(
    latents: np.ndarray | None,
    step_noise: np.ndarray | None,
    shape: tuple[int, int, int],
    count: int,
    steps: int,
) -> None:
    """Shapes of the arrays that replace drawn noise."""
    for name, array, expected in (
        ("latents", latents, (count, *shape)),
        ("step_noise", step_noise, (steps, count, *shape)),
    ):
        if array is not None and array.shape != expected:
            raise ValueError(f"{name} has shape {array.shape}; this call needs {expected}.")


def check_embeds(embeds: PromptEmbeds, config: ModelConfig, name: str) -> None:
    """Shapes of embeddings that the caller brings."""
    rows = (len(embeds), MAX_TOKENS)
    expected = {
        "embeds": (*rows, config.text_encoder.d_model),
        "attention_mask": rows,
        "lengths": rows[:1],
    }
    for field, shape in expected.items():
        found = np.shape(getattr(embeds, field))
        if found != shape:
            raise ValueError(f"{name}.{field} has shape {found}; this model needs {shape}.")


@dataclasses.dataclass(frozen=True)
class Images:
    """One row per image; what the device programs are fed from.

    Attributes:
        prompt: embeddings of the prompts.
        negative: of the negative prompts, windows widened to the prompts', or None.
        has_negative: bool (n,).
        guidance_scale: float32 (n,).
        key_data: random keys, uint32 (n, 2).
        latents: initial noise (n, h/8, w/8, 4), or None to draw it.
        step_noise: (steps, n, h/8, w/8, 4), or None.
    """

    prompt: PromptEmbeds
    negative: PromptEmbeds | None
    has_negative: np.ndarray
    guidance_scale: np.ndarray
    key_data: np.ndarray
    latents: np.ndarray | None
    step_noise: np.ndarray | None

    def __len__(self) -> int:
        return len(self.guidance_scale)

    def rows(self, index: np.ndarray) -> "Images":
        """The images at `index`, in that order."""
        return Images(
            self.prompt[index],
            None if self.negative is None else self.negative[index],
            self.has_negative[index],
            self.guidance_scale[index],
            self.key_data[index],
            None if self.latents is None else self.latents[index],
            None if self.step_noise is None else self.step_noise[:, index],
        )


def prompt_of_image(num_prompts: int, num_images_per_prompt: int) -> np.ndarray:
    """Which prompt each image is of; images of a prompt side by side."""
    if num_images_per_prompt < 1:
        raise ValueError(f"num_images_per_prompt is {num_images_per_prompt}; it must be 1 or more.")
    return np.repeat(np.arange(num_prompts), num_images_per_prompt)


def spread(
    prompt_of: np.ndarray,
    prompt: PromptEmbeds,
    negative: PromptEmbeds | None,
    has_negative: np.ndarray,
    guidance_scale: np.ndarray,
    key_data: np.ndarray,
    latents: np.ndarray | None,
    step_noise: np.ndarray | None,
) -> Images:
    """One row per image, from one row per prompt and what is per image already."""
    if negative is not None:
        # The references cut a negative to the prompt's window; here the wider window holds for it.
        lengths = np.maximum(negative.lengths, prompt.lengths)
        negative = PromptEmbeds(negative.embeds, negative.attention_mask, lengths)[prompt_of]
    return Images(
        prompt[prompt_of],
        negative,
        has_negative[prompt_of],
        guidance_scale,
        key_data,
        latents,
        step_noise,
    )
