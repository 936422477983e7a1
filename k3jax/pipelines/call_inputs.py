# SPDX-License-Identifier: Apache-2.0
"""The inputs of a call, checked together and for the checkpoint: texts, sampler, seeds, noise.

Single values are checked before, in k3jax/pipelines/options.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from k3jax.arguments import finite_array, warn_user
from k3jax.config import MAX_TOKENS, ModelConfig, SamplerConfig
from k3jax.model.context import PromptEmbeds
from k3jax.pipelines.options import CallOptions, TextToImageOptions
from k3jax.pipelines.rows import ImageRows, image_rows
from k3jax.sampling.denoise import sample_keys
from k3jax.sampling.samplers import Sampler, last_steps, make_sampler, steps_of_strength


if TYPE_CHECKING:
    from k3jax.pipelines.pipeline import BasePipeline


Size = tuple[int, int]
"""(width, height) in pixels."""

MOST_IMAGES = 1_000_000  # of a call, which holds them all in memory


class StepCountWarning(UserWarning):
    """A sampler runs another number of steps than it was asked for, or none that removes noise."""


class CallInputs:
    """The inputs of a call. Nothing is computed yet.

    Attributes:
        num_inputs: how many prompts, or pairs of prompt and image, there are.
        count: how many images there will be: `num_images_per_prompt` of each.
        input_of: the input of each image.
        sizes: of each input, at which it is worked on.
        steps: of each input, by its strength.
        sampler: with all of its steps.
        guided: whether any image is.
    """

    def __init__(
        self,
        options: CallOptions,
        config: ModelConfig,
        sizes: Sequence[Size],
        counts: Mapping[str, int] | None = None,
    ):
        """
        Args:
            sizes: one for all inputs, or one each.
            counts: name -> number of what is paired with the prompts, such as images.

        Raises:
            ValueError: one sentence on the argument that is wrong.
        """
        self.options, counts = options, dict(counts or {})
        if isinstance(strength := getattr(options, "strength", None), list):
            counts["strengths"] = len(strength)
        settings, self.sampler = checked_sampler(options.sampler_config(config))
        options.check_interval(self.sampler.num_steps)
        self._check_texts(config)
        embeds = options.prompt_embeds
        self._prompts = [] if embeds is not None else _each(options.prompt)
        if len(self._prompts) == 1 and max(counts.values(), default=1) > 1:
            self._prompts *= paired(counts)
        count = len(self._prompts) if embeds is None else len(embeds)
        self._negatives = self._negatives_of(count)
        self.num_inputs = paired({"prompts": count, **counts})
        strengths = strength if isinstance(strength, list) else [strength]
        self._strengths = strengths * (self.num_inputs if len(strengths) == 1 else 1)
        if self.num_inputs * options.num_images_per_prompt > MOST_IMAGES:
            raise ValueError(
                f"num_images_per_prompt is {options.num_images_per_prompt} for {self.num_inputs} "
                f"prompts; one call has at most {MOST_IMAGES:,} images (`k3jax synthesize` writes "
                "more)."
            )
        self._prompt_of = self._repeated(count)
        self.input_of = self._repeated(self.num_inputs)
        self.count = len(self._prompt_of)
        scale = options.guidance_scale
        scale = settings.guidance_scale if scale is None else scale
        self._scales = guidance_scales(scale, self.count)
        self.guided = self.sampler.guided and bool((self._scales > 0).any())
        self._keys = sample_keys(image_seeds(options.seed, self.count))
        self.sizes = list(sizes) * (self.num_inputs if len(sizes) == 1 else 1)
        self.steps = [self._steps_of(strength) for strength in self._strengths]
        self._check_noise(config)

    @property
    def denoised_sizes(self) -> list[Size]:
        """The sizes of the inputs for which a step runs."""
        return [size for size, steps in zip(self.sizes, self.steps, strict=True) if steps]

    def groups(self) -> Iterable[tuple[Size, Sampler | None, np.ndarray]]:
        """(size, sampler or None for no steps, numbers of the images) of each size and strength."""
        keys = [(self.sizes[i], self.steps[i]) for i in self.input_of]
        for size, count in dict.fromkeys(keys):
            index = np.array([n for n, key in enumerate(keys) if key == (size, count)])
            yield size, last_steps(self.sampler, count) if count else None, index

    def _steps_of(self, strength: float | None) -> int:
        if strength is None:  # a call without images
            return self.sampler.num_steps
        steps = steps_of_strength(strength, self.sampler.num_steps)
        if self.guided:
            self.options.warn_of_no_guidance(self.sampler.num_steps, steps, strength)
        return steps

    def _check_texts(self, config: ModelConfig) -> None:
        for name in ("prompt", "negative_prompt"):
            embeds = getattr(self.options, f"{name}_embeds")
            if embeds is None:
                continue
            if getattr(self.options, name) is not None:
                raise ValueError(f"give {name} or {name}_embeds, not both.")
            check_embeds(embeds, config, f"{name}_embeds")
        if self.options.prompt is None and self.options.prompt_embeds is None:
            raise ValueError("give prompt or prompt_embeds.")

    def _negatives_of(self, count: int) -> list[str | None]:
        """One negative prompt per prompt; one text serves all; None: unconditional guidance."""
        negative, embeds = self.options.negative_prompt, self.options.negative_prompt_embeds
        if embeds is not None and len(embeds) != count:
            raise ValueError(f"negative_prompt_embeds has {len(embeds)} rows for {count} prompts.")
        if not isinstance(negative, list):
            return [negative] * count
        if len(negative) != count:
            raise ValueError(
                f"negative_prompt has {len(negative)} entries for {count} prompts: give one "
                "string, or one entry per prompt."
            )
        return negative

    def _repeated(self, count: int) -> np.ndarray:
        """Which of `count` (1, or one per input) each image comes from, input by input."""
        rows = np.arange(self.num_inputs) if count == self.num_inputs else [0] * self.num_inputs
        return np.repeat(np.asarray(rows, np.int64), self.options.num_images_per_prompt)

    def _check_noise(self, config: ModelConfig) -> None:
        """The shapes of `latents` and `step_noise`."""
        if self.options.latents is None and self.options.step_noise is None:
            return
        if len(set(self.sizes)) > 1 or len(set(self.steps)) > 1:
            raise ValueError(
                "latents and step_noise are for images of one size and strength; these differ."
            )
        shape = latent_shape(config, self.sizes[0])
        for name, expected in (
            ("latents", (self.count, *shape)),
            ("step_noise", (self.steps[0], self.count, *shape)),
        ):
            array = getattr(self.options, name)
            if array is not None and array.shape != expected:
                raise ValueError(f"{name} has shape {array.shape}; this call needs {expected}.")

    def encode(self, pipe: "BasePipeline") -> ImageRows:
        """One row per image, the texts encoded."""
        noise = self.options.latents, self.options.step_noise
        encoded = self._encoded(pipe)
        return image_rows(self._prompt_of, *encoded, self._scales, self._keys, *noise)

    def _encoded(self, pipe: "BasePipeline"):
        """(embeddings, those of the negatives or None, which prompts have a negative).

        Each distinct text is encoded once, prompts and negatives in one go.
        """
        prompt_embeds = self.options.prompt_embeds
        negative_embeds = self.options.negative_prompt_embeds
        names = _names("prompt", self._prompts, self.options.prompt)
        for text, name in _names(
            "negative_prompt", self._negatives, self.options.negative_prompt
        ).items():
            names.setdefault(text, name)
        if names:
            windows = pipe.cut_texts(list(names), list(names.values()))
            encoded = pipe.encode_windows(windows)
        place = {text: row for row, text in enumerate(names)}
        if prompt_embeds is None:
            prompt_embeds = encoded[np.array([place[p] for p in self._prompts])]
        has_negative = np.array([n is not None for n in self._negatives])
        if negative_embeds is not None:
            has_negative = np.ones(len(prompt_embeds), bool)
        elif has_negative.any():
            negative_embeds = encoded[np.array([place.get(n, 0) for n in self._negatives])]
        return prompt_embeds, negative_embeds, has_negative


class TextToImageInputs(CallInputs):
    """The inputs of a call that starts from noise."""

    def __init__(self, options: TextToImageOptions, config: ModelConfig):
        """
        Raises:
            ValueError: one sentence on the argument that is wrong.
        """
        height, width = check_size(config, *options.size(config))
        super().__init__(options, config, [(width, height)])


def checked_sampler(settings: SamplerConfig) -> tuple[SamplerConfig, Sampler]:
    """(settings, the sampler that they describe).

    Warns where that runs another number of steps than was asked for (Flash always runs four, and
    the original's timesteps do not divide every number), and where a single step removes no noise:
    those of DDPM and DDIM begin at time 0 or 1, as diffusers has them.
    """
    sampler = make_sampler(settings)
    if sampler.num_steps != settings.num_inference_steps:
        warn_user(
            f"the sampler {settings.name} makes {sampler.num_steps} steps where "
            f"{settings.num_inference_steps} were asked for.",
            StepCountWarning,
        )
    if sampler.rows["timestep"][0] <= 1:
        warn_user(
            f"the only step of the sampler {settings.name} is at time "
            f"{sampler.rows['timestep'][0]:g} of 1000 and removes no noise: ask for more steps.",
            StepCountWarning,
        )
    return settings, sampler


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


def latent_shape(config: ModelConfig, size: Size) -> tuple[int, int, int]:
    """(h/8, w/8, 4) of an image of a size."""
    factor = config.movq.scale_factor
    return size[1] // factor, size[0] // factor, config.movq.latent_channels


def check_size(config: ModelConfig, height: int, width: int) -> tuple[int, int]:
    """(height, width); refuses what is no multiple of `size_multiple`, 64 as released."""
    multiple = size_multiple(config)
    for name, size in (("height", height), ("width", width)):
        if size < multiple or size % multiple:
            near = max(multiple, round(size / multiple) * multiple)
            raise ValueError(
                f"{name} is {size}; it must be a positive multiple of {multiple} "
                f"(the nearest is {near})."
            )
    return height, width


def image_seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """One seed per image: `seed + k` for image k, or those given. Python ints cannot wrap."""
    if isinstance(seed, int):
        return [seed + k for k in range(count)]
    if len(seed) != count:
        raise ValueError(f"seed has {len(seed)} entries for {count} images.")
    return list(seed)


def guidance_scales(guidance_scale: float | Sequence[float], count: int) -> np.ndarray:
    """w of each image, float32 (count,)."""
    with np.errstate(over="ignore"):
        scales = np.asarray(guidance_scale, np.float32)
    if scales.shape not in ((), (count,)):
        raise ValueError(f"guidance_scale has {scales.size} entries for {count} images.")
    if not np.isfinite(scales).all() or (scales < 0).any():
        raise ValueError(f"guidance_scale is {guidance_scale}; it must be 0 or more, and finite.")
    return np.broadcast_to(scales, (count,))


def check_latents(latents: np.ndarray, config: ModelConfig, name: str) -> np.ndarray:
    """Latents (b, h/8, w/8, 4) of images as a host array in float32."""
    factor, channels = config.movq.scale_factor, config.movq.latent_channels
    latents = finite_array(latents, name)
    shape = latents.shape
    if len(shape) != 4 or shape[-1] != channels or 0 in shape:
        raise ValueError(
            f"{name} has shape {shape}; it must be (b, h/{factor}, w/{factor}, {channels})."
        )
    return latents


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


def _each(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


def _names(name: str, texts: Sequence[str | None], value: Any) -> dict[str, str]:
    """Text -> its name in messages, of the distinct texts."""
    numbered = isinstance(value, list)
    names: dict[str, str] = {}
    for number, text in enumerate(texts):
        if text is not None:
            names.setdefault(text, f"{name} {number}" if numbered else name)
    return names
