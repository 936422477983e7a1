# SPDX-License-Identifier: Apache-2.0
"""The run of a command that generates images: encode the prompts, then write batch after batch."""

import dataclasses
import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from k3jax.checkpoints.format import Checkpoint
from k3jax.cli.distributed import is_writer
from k3jax.cli.image_files import PlannedImage
from k3jax.cli.inputs import NOTE, check_lora
from k3jax.cli.run_config import RunConfig
from k3jax.config import COMPONENTS, to_dict
from k3jax.images.pngs import write_png
from k3jax.model.context import PromptEmbeds
from k3jax.pipelines.call_inputs import CallInputs
from k3jax.pipelines.load_options import LoadOptions
from k3jax.pipelines.loading import checked_batch_size
from k3jax.pipelines.memory import check_memory
from k3jax.pipelines.option_fields import option_fields
from k3jax.pipelines.options import CallOptions
from k3jax.pipelines.pipeline import BasePipeline
from k3jax.sharding import make_meshes


CELL = (512, 512)  # largest size of an image in a contact sheet


@dataclass(frozen=True)
class ImageRun:
    """What a command runs.

    Attributes:
        checkpoint: its config has the sampler and the size of the run.
        inputs: of all images, with their options.
        load: with the meshes and the batch size.
    """

    pipeline: type[BasePipeline]
    checkpoint: Checkpoint
    config: RunConfig
    inputs: CallInputs
    load: LoadOptions

    @property
    def options(self) -> CallOptions:
        return self.inputs.options

    @classmethod
    def checked(
        cls,
        pipeline: type[BasePipeline],
        checkpoint: Checkpoint,
        config: RunConfig,
        options: CallOptions,
    ) -> "ImageRun":
        """A run whose settings are right, as far as that is known without the weights.

        Raises:
            ValueError: an option that is wrong, a mesh or batch size that does not fit the devices,
                images that do not fit in their memory, or a LoRA that does not fit the model.
        """
        pipeline.check_config(checkpoint.config)
        inputs = pipeline.call_inputs(options, checkpoint.config)
        load = LoadOptions.from_sources(config.pipeline)
        mesh, encoder_mesh = make_meshes(load.mesh, load.encoder_mesh)
        batch_size = checked_batch_size(load.batch_size, mesh, encoder_mesh)
        run = checkpoint.config, mesh, batch_size, load.dtype
        check_memory(*run, inputs.denoised_sizes, inputs.guided)
        check_lora(config)
        load = dataclasses.replace(
            load, mesh=mesh, encoder_mesh=encoder_mesh, batch_size=batch_size
        )
        return cls(pipeline, checkpoint, config, inputs, load)

    def write(
        self,
        images: Sequence[PlannedImage],
        progress: bool,
        inputs: Mapping[str, Sequence[Any]] | None = None,
        files: Mapping[str, Sequence[str]] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> list[Image.Image]:
        """Generates the images; writes each with its settings, and prints its path.

        Args:
            inputs: option -> its value for each input, such as images and masks.
            files: the same as paths, for the settings.
            settings: recorded beside those of every run.

        Returns:
            The images, in a size for contact sheets.
        """
        if self.config.checkpoint is None:
            print(NOTE, file=sys.stderr)
        pipe, embeds = self._load_and_encode(images)
        common = self._settings(pipe) | dict(settings or {})
        call = self._call_settings()
        if self.config.pipeline.lora is not None:
            lora = pipe.load_lora(self.config.pipeline.lora, self.config.pipeline.lora_scale)
            scale = self.config.pipeline.lora_scale
            common["lora"] = {"fingerprint": lora.fingerprint, "scale": scale}
        inputs, files, small = inputs or {}, files or {}, {}
        several = progress and len(images) > pipe.batch_size
        with tqdm(total=len(images), unit="image", disable=not several) as bar:
            for batch in _batches(images, self.inputs.sizes, pipe.batch_size):
                results = pipe(
                    self.options,
                    prompt=None,
                    negative_prompt=None,
                    num_images_per_prompt=1,
                    seed=[image.seed for image in batch],
                    progress_bar=progress,
                    **embeds.of(batch),
                    **{name: [each[i.input] for i in batch] for name, each in inputs.items()},
                ).images
                for planned, image in zip(batch, results, strict=True) if is_writer() else ():
                    own = {"prompt": planned.prompt, "seed": planned.seed}
                    own |= {name: each[planned.input] for name, each in files.items()}
                    write_png(image, planned.path, {**common, "call": {**own, **call}})
                    tqdm.write(str(planned.path), file=sys.stdout)
                    small[planned] = ImageOps.contain(image, CELL)
                    bar.update()
        return [small[planned] for planned in images] if is_writer() else []

    def _load_and_encode(
        self, images: Sequence[PlannedImage]
    ) -> tuple[BasePipeline, "PlannedEmbeds"]:
        """A pipeline without the text encoder, and the prompts' embeddings.

        The text encoder, by far the largest component, is freed before the others are loaded, so
        the devices never hold both.
        """
        encoder = self.pipeline.from_pretrained(
            self.checkpoint, self.load, components=("text_encoder",)
        )
        embeds = PlannedEmbeds(encoder, images, self.options.negative_prompt)
        del encoder
        gc.collect()
        others = [name for name in COMPONENTS if name != "text_encoder"]
        return self.pipeline.from_pretrained(self.checkpoint, self.load, components=others), embeds

    def _call_settings(self) -> dict[str, Any]:
        """The options of a call for one image, those of the checkpoint included."""
        options, model = self.options, self.checkpoint.config
        values = {
            name: getattr(options, name)
            for name, option in option_fields(type(options)).items()
            if option.group and name not in ("seed", "num_images_per_prompt")
        }
        sampler = options.sampler_config(model)
        values |= {
            "num_inference_steps": sampler.num_inference_steps,
            "guidance_scale": sampler.guidance_scale,
            "sampler": sampler.name,
            "eta": sampler.eta,
        }
        if "height" in values:
            values["height"], values["width"] = options.size(model)
        return values

    def _settings(self, pipe: BasePipeline) -> dict[str, Any]:
        """What an image depends on apart from its call, and what decides its last bits."""
        load = dataclasses.asdict(self.config.pipeline)
        del load["lora"], load["lora_scale"]
        return {
            "k3jax": version("k3jax"),
            "jax": jax.__version__,
            "device": pipe.mesh.devices.flat[0].device_kind,
            **load,
            "mesh": dict(pipe.mesh.shape),
            "batch_size": pipe.batch_size,
            "param_dtype": load["param_dtype"] or load["dtype"],
            "checkpoint": {
                "fingerprint": self.checkpoint.fingerprint,
                "source": self.checkpoint.source,
            },
            "conditioning": self.checkpoint.config.conditioning,
            "sampler": to_dict(self.options.sampler_config(self.checkpoint.config)),
        }


class PlannedEmbeds:
    """The embeddings of a run's prompts; each distinct prompt is encoded once."""

    def __init__(
        self, pipe: BasePipeline, images: Sequence[PlannedImage], negative_prompt: str | None
    ):
        names = {}
        for image in images:
            names.setdefault(image.prompt, f"prompt {image.input}")
        self._row = {prompt: row for row, prompt in enumerate(names)}
        self._prompts = _encoded(pipe, names)
        self._negative = None
        if negative_prompt is not None:
            self._negative = _encoded(pipe, {negative_prompt: "negative_prompt"})

    def of(self, batch: Sequence[PlannedImage]) -> dict[str, PromptEmbeds]:
        """The pipeline's arguments for these images."""
        rows = np.array([self._row[image.prompt] for image in batch])
        embeds = {"prompt_embeds": self._prompts[rows]}
        if self._negative is not None:
            embeds["negative_prompt_embeds"] = self._negative[np.zeros_like(rows)]
        return embeds


def _encoded(pipe: BasePipeline, names: Mapping[str, str]) -> PromptEmbeds:
    """Embeddings of prompts, which have names in messages."""
    return pipe.encode_windows(pipe.cut_texts(list(names), list(names.values())))


def _batches(
    images: Sequence[PlannedImage], sizes: Sequence[tuple[int, int]], batch_size: int
) -> Iterator[list[PlannedImage]]:
    """Images of one size together, so that few batches are padded."""
    size_of = [sizes[image.input] for image in images]
    for size in dict.fromkeys(size_of):
        same = [image for image, own in zip(images, size_of, strict=True) if own == size]
        yield from (same[k : k + batch_size] for k in range(0, len(same), batch_size))
