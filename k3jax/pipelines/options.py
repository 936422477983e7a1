# SPDX-License-Identifier: Apache-2.0
"""Every argument of the pipelines, once: its default, text, check, flag and config key.

The pipelines' signatures, the command line, configs, data sets and `plan` come from these classes.
To add an option, add a field here and read it where it has its effect. The values are checked one
by one when an object is created. What they must be together, and for a checkpoint, is checked in
k3jax/pipelines/call_inputs.py.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from k3jax.arguments import (
    check_interval,
    check_number,
    check_texts,
    check_texts_or_none,
    finite_array,
    one_or_each,
    shown,
    warn_user,
    whole_number,
)
from k3jax.config import ModelConfig, SamplerConfig, SamplerName
from k3jax.pipelines.option_fields import Options, option


if TYPE_CHECKING:
    from k3jax.model.context import PromptEmbeds
    from k3jax.pipelines.preview import StepPreview

OutputType = Literal["pil", "np", "latent"]

check_count = functools.partial(whole_number, least=1)
check_positive = functools.partial(check_number, least=0)
check_share = functools.partial(check_number, least=0, most=1)
generate = functools.partial(option, group="generate")
edit = functools.partial(option, group="edit")


def check_embeds(value: Any, name: str) -> "PromptEmbeds":
    """What `encode_prompt` returns; its shapes are checked with the model."""
    if all(hasattr(value, part) for part in ("embeds", "attention_mask", "lengths")):
        return value
    raise ValueError(
        f"{name} is {shown(value)}; it must be what encode_prompt returns (PromptEmbeds)."
    )


def check_function(value: Any, name: str) -> Callable:
    if callable(value):
        return value
    raise ValueError(f"{name} is {shown(value)}; it must be a function of a StepPreview.")


def check_steps(value: Any, name: str) -> tuple[int, int]:
    """(first, last); whether the sampler has such steps is checked later."""
    try:
        first, last = value
        return whole_number(first, name), whole_number(last, name)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} is {shown(value)}; it must be two whole numbers, the first and the last step, "
            "counted from 0."
        ) from None


def check_seeds(value: Any, name: str) -> int | list[int]:
    if hasattr(value, "initial_seed"):
        raise ValueError(f"{name} is a torch Generator; give its number: generator.initial_seed().")
    return one_or_each(whole_number)(value, name)


def check_image(value: Any, name: str) -> Any:
    """Anything: k3jax/images/reading.py checks images when it reads them."""
    return value


NO_SCHEDULE = "give num_inference_steps and sampler, which computes its own timesteps"
ADVICE = {
    "generator": "give seed, a whole number, or one for each image",
    "callback_on_step_end": "give callback, a function of a StepPreview (k3jax.pipelines.preview)",
    "callback_on_step_end_tensor_inputs": "callback gets a StepPreview, which holds the latents",
    "timesteps": NO_SCHEDULE,
    "sigmas": NO_SCHEDULE,
    "attention_mask": "it is part of prompt_embeds",
    "prompt_attention_mask": "it is part of prompt_embeds",
    "negative_attention_mask": "it is part of negative_prompt_embeds",
    "cross_attention_kwargs": "the strength of a LoRA is an argument of load_lora",
    "return_dict": "a call returns an object with the attribute images; leave it out",
    "clean_caption": "prompts are used as they are; leave it out",
}
OWN_SIZE = "a result has the size of its image: resize the image, or give max_area"


@dataclass(frozen=True, kw_only=True, eq=False)
class CallOptions(Options):
    """Options of a call of any pipeline."""

    advice: ClassVar[Mapping[str, str]] = ADVICE

    prompt: str | Sequence[str] | None = option(
        None, "what to see: one text or several. Or give `prompt_embeds`", check_texts
    )
    num_inference_steps: int | None = generate(
        None,
        "steps of the sampler. The checkpoint's own number by default",
        check_count,
        "--steps --num-inference-steps N",
    )
    guidance_scale: float | Sequence[float] | None = generate(
        None,
        "the guided noise is (W + 1) conditional - W unconditional. Any W of 0 or more, for all "
        "images or one each; 0 costs one forward pass a step. The checkpoint's own by default",
        one_or_each(check_positive),
        "--guidance-scale W",
    )
    negative_prompt: str | Sequence[str | None] | None = generate(
        None,
        "what not to see. One text for all prompts, or one (or None) each",
        check_texts_or_none,
        "--negative-prompt TEXT",
    )
    num_images_per_prompt: int = generate(
        1, "images of each prompt or input", check_count, "-n --num-images N"
    )
    seed: int | Sequence[int] = generate(
        0,
        "seed of the first image; the next ones count up. Or one seed for each image",
        check_seeds,
        "--seed N",
    )
    sampler: SamplerName | None = generate(
        None, "how the noise is removed. The checkpoint's own sampler by default", flag="--sampler"
    )
    eta: float | None = generate(
        None,
        "share of new noise in each step, 0 to 1. The checkpoint's own by default",
        check_share,
        "--eta X",
    )
    guidance_interval: tuple[int, int] | None = generate(
        None,
        "guide only these steps, counted from 0; the others cost half. The first and the last "
        "step, of the whole schedule also where only its last steps run",
        check_steps,
        "--guidance-interval FIRST LAST",
    )
    latents: np.ndarray | None = option(
        None, "(b, h/8, w/8, 4) instead of the drawn initial noise", finite_array
    )
    step_noise: np.ndarray | None = option(
        None, "(steps, b, h/8, w/8, 4) instead of the noise drawn at each step", finite_array
    )
    prompt_embeds: "PromptEmbeds | None" = option(
        None, "what `encode_prompt` returned, instead of `prompt`", check_embeds
    )
    negative_prompt_embeds: "PromptEmbeds | None" = option(
        None, "the same for the negative prompts", check_embeds
    )
    output_type: OutputType = option("pil", '"pil", "np" or "latent"; see `Output`')
    progress_bar: bool = option(True, "whether to show one")
    callback: "Callable[[StepPreview], Any] | None" = option(
        None, "function of a `k3jax.pipelines.preview.StepPreview` of each batch", check_function
    )
    callback_steps: int = option(1, "steps between two calls of `callback`", check_count)

    def sampler_config(self, config: ModelConfig) -> SamplerConfig:
        """The checkpoint's sampler with what differs in this call."""
        scale = self.guidance_scale
        changes = {
            "name": self.sampler,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": None if isinstance(scale, list) else scale,
            "eta": self.eta,
        }
        changes = {name: value for name, value in changes.items() if value is not None}
        return dataclasses.replace(config.sampler, **changes)

    def check_interval(self, num_steps: int) -> None:
        """Refuses a guidance interval outside of a sampler's steps."""
        if self.guidance_interval is not None:
            check_interval(self.guidance_interval, "guidance_interval", num_steps)

    def warn_of_no_guidance(self, num_steps: int, count: int, strength: float) -> None:
        """Warns where the guidance interval ends before the last `count` steps begin."""
        interval, first = self.guidance_interval, num_steps - count
        if count and interval is not None and interval[1] < first:
            warn_user(
                f"guidance_interval {interval} guides none of the steps {first} to "
                f"{num_steps - 1} that strength {strength:g} leaves: it counts the steps of the "
                "whole schedule."
            )


PIXELS = "in pixels, a multiple of 64. The checkpoint's own (1024) by default"


@dataclass(frozen=True, kw_only=True, eq=False)
class TextToImageOptions(CallOptions):
    """Options of `Kandinsky3Pipeline`."""

    order: ClassVar[str] = "prompt negative_prompt height width"

    height: int | None = generate(None, f"height {PIXELS}", whole_number, "--height PIXELS")
    width: int | None = generate(None, f"width {PIXELS}", whole_number, "--width PIXELS")

    def size(self, config: ModelConfig) -> tuple[int, int]:
        """(height, width), with the checkpoint's own where they are None."""
        sides = (self.height, self.width)
        return tuple(config.sample_size if side is None else side for side in sides)


@dataclass(frozen=True, kw_only=True, eq=False)
class EditOptions(CallOptions):
    """Options of a call of the pipelines that start from images."""

    advice: ClassVar[Mapping[str, str]] = ADVICE | {"height": OWN_SIZE, "width": OWN_SIZE}

    image: Any = option(
        None,
        "an image. One for all prompts, or one each, in any sizes: paths, PIL images, arrays; see "
        "k3jax/images/reading.py. A result has the size of its image",
        check_image,
        "--image FILE",
        repeated=True,
    )
    max_area: int | None = edit(
        None,
        "larger images are worked on at this many pixels. As many as an image of the checkpoint's "
        "own size has (1024 x 1024) by default",
        check_count,
        "--max-area PIXELS",
    )


EDIT_ORDER = (
    "strength num_inference_steps guidance_scale negative_prompt num_images_per_prompt seed "
    "sampler eta guidance_interval max_area"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageToImageOptions(EditOptions):
    """Options of `Kandinsky3Img2ImgPipeline`."""

    order: ClassVar[str] = f"prompt image {EDIT_ORDER} image_latents"

    strength: float | Sequence[float] = edit(
        0.3,
        "how much is changed, 0 to 1. For all images or one each: only the last int(n * strength) "
        "of n steps run. 0 returns the autoencoded image",
        one_or_each(check_share),
        "--strength X",
    )
    image_latents: np.ndarray | None = option(
        None,
        '(b, h/8, w/8, 4) instead of `image`. As `output_type="latent"` returns them: a second '
        "checkpoint can refine what a first one generated",
        finite_array,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class InpaintOptions(EditOptions):
    """Options of `Kandinsky3InpaintPipeline`."""

    order: ClassVar[str] = f"prompt image mask_image {EDIT_ORDER} feather paste_back"

    mask_image: Any = option(
        None,
        "white where to paint anew. One for all images, or one each, of the image's size: white, 1 "
        "or True is repainted. The model gets fractions as they are",
        check_image,
        "--mask FILE",
        repeated=True,
    )
    strength: float | Sequence[float] = edit(
        1.0,
        "1 paints from noise, less from what is under the mask. For all images or one each",
        one_or_each(check_share),
        "--strength X",
    )
    feather: float | None = edit(
        None,
        "pixels over which new and old fade into each other. As many as one latent covers by "
        "default: 8, or more where the image was made smaller",
        check_positive,
        "--feather PIXELS",
    )
    paste_back: bool = option(
        True,
        "whether the pixels outside of mask and feather are put back as they were. False returns "
        "the model's own pixels",
    )
