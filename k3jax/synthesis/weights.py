# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as the pipelines that make a data set, whole or in parts."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from k3jax.checkpoints.format import Checkpoint, as_path
from k3jax.checkpoints.lora_files import load_lora
from k3jax.checkpoints.restore import leaf_shapes
from k3jax.model.tokenizer import Tokenizer
from k3jax.pipelines.compilation_cache import enable_compilation_cache
from k3jax.pipelines.load_options import LoadOptions
from k3jax.pipelines.loading import checked_batch_size, load_component
from k3jax.pipelines.pipeline import BasePipeline
from k3jax.sharding import data_parallelism, make_meshes
from k3jax.synthesis.input_images import pipeline_class
from k3jax.synthesis.phases import ALL, LoadPipeline
from k3jax.synthesis.run_manifest import Settings


WEIGHTS_SHARE = 0.7  # of device memory; the rest is for activations


@dataclass(frozen=True)
class Weights:
    """A checkpoint, and the LoRA for its U-Net."""

    checkpoint: Checkpoint
    lora: str | None = None
    lora_scale: float = 1.0

    def __post_init__(self):
        if self.lora is None and self.lora_scale != 1:
            raise ValueError("--lora-scale is the strength of a LoRA: give its folder with --lora.")

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What the images depend on."""
        values = {"fingerprint": self.checkpoint.fingerprint}
        if self.lora is not None:
            values |= {"lora": load_lora(self.lora).fingerprint, "lora_scale": self.lora_scale}
        return values

    @property
    def places(self) -> dict[str, str]:
        """Where the folders are."""
        places = {"checkpoint": str(self.checkpoint.path)}
        return places if self.lora is None else places | {"lora": str(as_path(self.lora))}


@dataclass(frozen=True)
class Devices:
    """The devices of this host, and how they are used.

    Attributes:
        encoder_mesh: of the text encoder, over the same devices.
        batch_size: images of a compiled batch over all of them.
        stream_text_encoder: it is read layer by layer for each encoding, and takes no memory.
    """

    mesh: jax.sharding.Mesh
    encoder_mesh: jax.sharding.Mesh
    batch_size: int
    stream_text_encoder: bool = False

    @classmethod
    def local(
        cls,
        mesh: str,
        encoder_mesh: str | None = None,
        images_per_device: int | None = None,
        stream_text_encoder: bool = False,
    ) -> "Devices":
        """Those of this host alone, so that hosts do not wait for each other."""
        meshes = make_meshes(mesh, encoder_mesh, jax.local_devices())
        batch_size = data_parallelism(meshes[0]) * (images_per_device or 1)
        return cls(*meshes, batch_size, stream_text_encoder)

    def with_batch_size(self, batch_size: int | None) -> "Devices":
        """None changes nothing.

        Raises:
            ValueError: it does not split over the devices.
        """
        chosen = self.batch_size if batch_size is None else batch_size
        chosen = checked_batch_size(chosen, self.mesh, self.encoder_mesh)
        return dataclasses.replace(self, batch_size=chosen)


def loader(weights: Weights, settings: Settings, devices: Devices) -> LoadPipeline:
    """A function that loads some components, with the data set's sampler as the default."""
    enable_compilation_cache()
    checkpoint = weights.checkpoint
    config = dataclasses.replace(
        checkpoint.config, sampler=settings.sampler, conditioning=settings.conditioning
    )
    tokenizer = Tokenizer(checkpoint.path / "tokenizer")

    form = LoadOptions(
        int8_text_encoder=settings.int8_text_encoder,
        stream_text_encoder=devices.stream_text_encoder,
    ).text_encoder_form

    def loaded(name: str):
        encoder = name == "text_encoder"
        mesh = devices.encoder_mesh if encoder else devices.mesh
        dtypes = settings.dtype, settings.param_dtype
        return load_component(checkpoint, name, mesh, dtypes, form=form if encoder else "whole")

    kind = pipeline_class(config.unet.in_channels, config.movq.latent_channels)

    def load(parts: Sequence[str]) -> BasePipeline:
        components = {name: loaded(name) if name in parts else None for name in ALL}
        pipe = kind(
            config,
            tokenizer,
            components,
            devices.mesh,
            devices.batch_size,
            fingerprint=checkpoint.fingerprint,
            encoder_mesh=devices.encoder_mesh,
        )
        if weights.lora is not None and "unet" in parts:
            pipe.load_lora(weights.lora, weights.lora_scale)
        return pipe

    return load


def weights_fit_together(checkpoint: Checkpoint, settings: Settings, devices: Devices) -> bool:
    """Whether a device has memory for its part of all weights; True where that is unknown."""
    memory = devices.mesh.devices.flat[0].memory_stats() or {}
    if "bytes_limit" not in memory:
        return True
    needed = 0.0
    for name in ALL:
        encoder = name == "text_encoder"
        if encoder and devices.stream_text_encoder:
            continue
        shape = (devices.encoder_mesh if encoder else devices.mesh).shape
        of_weight = np.dtype(settings.param_dtype).itemsize
        if encoder and settings.int8_text_encoder:
            of_weight = 1
        count = sum(math.prod(leaf.shape) for leaf in leaf_shapes(checkpoint, name).values())
        needed += count * of_weight / (shape["fsdp"] * shape["tensor"])
    return needed < WEIGHTS_SHARE * memory["bytes_limit"]
