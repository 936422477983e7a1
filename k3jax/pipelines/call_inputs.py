# SPDX-License-Identifier: Apache-2.0
"""What a pipeline call asks for, checked and spread out to one row per image."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from k3jax.arguments import finite_array, whole_number
from k3jax.config import MAX_TOKENS, ModelConfig, SamplerConfig, SamplerName
from k3jax.model.context import PromptEmbeds
from k3jax.sampling.samplers import Sampler, make_sampler


OutputType = Literal["pil", "np", "latent"]


class StepCountWarning(UserWarning):
    """A sampler makes another number of steps than it was asked for."""


def check_text_to_image(config: ModelConfig, task: str = "text to image") -> None:
    """Refuses a model that also needs a masked image."""
    if config.unet.in_channels != config.movq.latent_channels:
        raise ValueError(
            f"this is an inpainting checkpoint (its U-Net takes {config.unet.in_channels} "
            f"channels, not {config.movq.latent_channels}): {task} needs a base or Flash "
            "checkpoint; use this one with Kandinsky3InpaintPipeline or `k3jax inpaint`."
        )


def size_multiple(config: ModelConfig) -> int:
    """Pixels that sides are multiples of: the U-Net halves at every level but the last."""
    return config.movq.scale_factor * 2 ** (len(config.unet.block_out_channels) - 1)


def check_output_type(output_type: str) -> None:
    if output_type not in get_args(OutputType):
        known = ", ".join(get_args(OutputType))
        raise ValueError(f"output_type {output_type!r} is not one of {known}.")


def check_size(config: ModelConfig, height: int, width: int) -> tuple[int, int]:
    """(height, width) as ints; refuses what is no multiple of `size_multiple`, 64 as released."""
    multiple, sizes = size_multiple(config), []
    for name, value in (("height", height), ("width", width)):
        size = whole_number(value, name)
        if size < multiple or size % multiple:
            near = max(multiple, round(size / multiple) * multiple)
            raise ValueError(
                f"{name} is {size}; it must be a positive multiple of {multiple} "
                f"(the nearest is {near})."
            )
        sizes.append(size)
    return sizes[0], sizes[1]


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
    """One seed per image, `seed + k` for image k or those given: Python ints, which cannot wrap."""
    if not np.ndim(seed):
        first = whole_number(seed, "seed")
        return [first + k for k in range(count)]
    seeds = [whole_number(one, "seed") for one in seed]
    if len(seeds) != count:
        raise ValueError(f"seed has {len(seeds)} entries for {count} images.")
    return seeds


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


def chosen_sampler(defaults: SamplerConfig, **given) -> tuple[SamplerConfig, Sampler]:
    """`override` and the sampler that it describes.

    Warns where that makes another number of steps than was asked for (Flash always makes four, and
    the original's timesteps do not divide every number), and where a single step removes no noise:
    those of DDPM and DDIM begin at time 0 or 1, as diffusers has them.
    """
    settings = override(defaults, **given)
    sampler = make_sampler(settings)
    if sampler.num_steps != settings.num_inference_steps:
        warnings.warn(
            f"the sampler {settings.name} makes {sampler.num_steps} steps where "
            f"{settings.num_inference_steps} were asked for.",
            StepCountWarning,
            stacklevel=4,
        )
    if sampler.rows["timestep"][0] <= 1:
        warnings.warn(
            f"the only step of the sampler {settings.name} is at time "
            f"{sampler.rows['timestep'][0]:g} of 1000 and removes no noise: ask for more steps.",
            StepCountWarning,
            stacklevel=4,
        )
    return settings, sampler


def check_noise(
    latents: np.ndarray | None,
    step_noise: np.ndarray | None,
    shape: tuple[int, int, int],
    count: int,
    steps: int,
) -> None:
    """Shapes and values of the arrays that replace drawn noise."""
    for name, array, expected in (
        ("latents", latents, (count, *shape)),
        ("step_noise", step_noise, (steps, count, *shape)),
    ):
        if array is None:
            continue
        if np.shape(array) != expected:
            raise ValueError(f"{name} has shape {np.shape(array)}; this call needs {expected}.")
        finite_array(array, name)


def check_latents(latents: np.ndarray, config: ModelConfig, name: str) -> np.ndarray:
    """Latents (b, h/8, w/8, 4) of images as a host array in float32."""
    factor, channels = config.movq.scale_factor, config.movq.latent_channels
    shape = np.shape(latents)
    if len(shape) != 4 or shape[-1] != channels or 0 in shape:
        raise ValueError(
            f"{name} has shape {shape}; it must be (b, h/{factor}, w/{factor}, {channels})."
        )
    return finite_array(latents, name)


def check_embeds(embeds: PromptEmbeds, config: ModelConfig, name: str) -> None:
    """Shapes and values of embeddings that the caller brings."""
    rows = (len(embeds), MAX_TOKENS)
    expected = {
        "embeds": (*rows, config.text_encoder.d_model),
        "attention_mask": rows,
        "lengths": rows[:1],
    }
    if embeds.token_weights is not None:
        expected["token_weights"] = rows
    for field, shape in expected.items():
        found = np.shape(getattr(embeds, field))
        if found != shape:
            raise ValueError(f"{name}.{field} has shape {found}; this model needs {shape}.")
    finite_array(embeds.embeds, f"{name}.embeds")
    if embeds.token_weights is not None:
        weights = finite_array(embeds.token_weights, f"{name}.token_weights")
        if (weights < 0).any():
            raise ValueError(f"{name}.token_weights holds {weights.min()}; all must be 0 or more.")
    lengths = np.asarray(embeds.lengths)
    if (lengths < 1).any() or (lengths > MAX_TOKENS).any():
        raise ValueError(f"{name}.lengths must be between 1 and {MAX_TOKENS}, not {lengths}.")


def paired(counts: Mapping[str, int]) -> int:
    """How many there are of what comes in pairs: each kind once for all, or one for each.

    Raises:
        ValueError: two kinds come several times, but not equally often.
    """
    several = {name: count for name, count in counts.items() if count != 1}
    if len(set(several.values())) > 1 or 0 in several.values():
        found = " and ".join(f"{count} {name}" for name, count in several.items())
        raise ValueError(f"there are {found}: give one for all, or one for each.")
    return max(counts.values())


def repeated(count: int, num_inputs: int, num_images_per_prompt: int) -> np.ndarray:
    """Which of `count` (1 or `num_inputs`) each image is made from; images of one side by side."""
    rows = np.arange(num_inputs) if count == num_inputs else np.zeros(num_inputs, np.int64)
    return np.repeat(rows, num_images_per_prompt)
