# SPDX-License-Identifier: Apache-2.0
"""The components of a checkpoint on a mesh: loading, sharing, a LoRA over the U-Net."""

import contextlib
from collections.abc import Collection, Mapping
from typing import Any, Self

import jax
import numpy as np
from flax import nnx

from k3jax.arguments import whole_number
from k3jax.checkpoints.format import read_checkpoint
from k3jax.checkpoints.lora_files import Lora, load_lora, warn_of_another_base
from k3jax.config import ModelConfig
from k3jax.model import adapters
from k3jax.model.abstract import COMPONENTS
from k3jax.model.tokenizer import Tokenizer
from k3jax.pipelines.compilation_cache import enable_compilation_cache
from k3jax.pipelines.components import (
    component_digests,
    load_components,
    share_components,
    text_encoder_form,
)
from k3jax.pipelines.programs import computing, image_splits
from k3jax.pipelines.prompts import LongPrompts
from k3jax.sharding import data_parallelism, make_mesh, place


def checked_batch_size(
    batch_size: int | None, mesh: jax.sharding.Mesh, encoder_mesh: jax.sharding.Mesh
) -> int:
    """Images per compiled batch; one per device where it is None.

    Raises:
        ValueError: no whole number of 1 or more, or one that does not split over the meshes.
    """
    size = data_parallelism(mesh) if batch_size is None else batch_size
    size = whole_number(size, "batch_size", least=1)
    for each in (mesh, encoder_mesh):
        image_splits(each, size)
    return size


class LoadedModel:
    """The components of a checkpoint on a mesh.

    Attributes:
        text_encoder, text_projection, unet, movq: the modules. Pipelines may share them.
        batch_size: images per compiled batch over the whole mesh.
        long_prompts: what is done with prompts of more than 128 tokens: "truncate" cuts them off
            with a warning, "error" refuses them, "average" encodes them in parts and takes the
            mean of what the parts say at each position.
        preview: the map of previews, see k3jax/pipelines/preview.py; None until it is needed.
    """

    long_prompts: LongPrompts = "truncate"
    preview: np.ndarray | None = None

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        components: dict[str, Any],
        mesh: jax.sharding.Mesh,
        batch_size: int | None = None,
        fingerprint: str | None = None,
        digests: Mapping[str, str] | None = None,
        encoder_mesh: jax.sharding.Mesh | None = None,
    ):
        """
        Args:
            components: the modules by the names in `k3jax.model.abstract.COMPONENTS`, on `mesh`;
                None for those that this pipeline is to do without.
            batch_size: images per compiled batch over the whole mesh; one per device by default. A
                call of any other size is cut into such batches, the last one padded.
            fingerprint: the checkpoint's, which a LoRA is compared with.
            digests: of the components' weights, by which `from_pipe` knows equal ones.
            encoder_mesh: of the text encoder, over the same devices; `mesh` by default.
        """
        self.check_config(config)
        self.config, self.tokenizer, self.mesh = config, tokenizer, mesh
        self.encoder_mesh = mesh if encoder_mesh is None else encoder_mesh
        self.fingerprint, self.digests = fingerprint, dict(digests or {})
        self.text_encoder = components["text_encoder"]
        self.text_projection = components["text_projection"]
        self.unet = components["unet"]
        self._unet_without_lora = None
        self.movq = components["movq"]
        self.batch_size = batch_size

    @property
    def batch_size(self) -> int:
        return self._batch_size

    @batch_size.setter
    def batch_size(self, batch_size: int | None) -> None:
        self._batch_size = checked_batch_size(batch_size, self.mesh, self.encoder_mesh)

    @staticmethod
    def check_config(config: ModelConfig) -> None:
        """Refuses checkpoints that this pipeline cannot run."""

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        mesh: str | jax.sharding.Mesh = "data=-1",
        encoder_mesh: str | jax.sharding.Mesh | None = None,
        dtype: str | Mapping[str, str] = "bfloat16",
        param_dtype: str | None = None,
        batch_size: int | None = None,
        verify: bool | None = None,
        int8_text_encoder: bool = False,
        stream_text_encoder: bool = False,
        components: Collection[str] | None = None,
    ) -> Self:
        """Loads a checkpoint made by `k3jax convert`, straight into the mesh's shardings.

        Args:
            path: the checkpoint's folder.
            mesh: a mesh, or axis sizes such as "data=-1,tensor=2".
            encoder_mesh: another over the same devices for the text encoder: "tensor=-1" splits it
                over all of them, where with mesh="data=-1" each has a U-Net of its own.
            dtype: of the computation, "bfloat16" or "float32"; or one for each component, as
                {"movq": "float32"}, bfloat16 where none is named.
            param_dtype: of the weights; that of the computation by default.
            verify: check the files' checksums first; see `k3jax.checkpoints.restore.restore`.
            int8_text_encoder: its matrices in int8, half the memory; see `k3jax.model.int8`.
            stream_text_encoder: read it layer by layer whenever prompts are encoded, instead of
                holding it; see `k3jax.pipelines.streaming`.
            components: load only these, by the names in `k3jax.model.abstract.COMPONENTS`. Where
                not all fit, prompts are encoded with ("text_encoder",), and their embeddings given
                to a pipeline of the others.

        Raises:
            CheckpointError: not a checkpoint, damaged, or of another architecture.
            ValueError: a mesh that does not divide the devices, a batch that does not split over
                it, a component that there is not, or a text encoder both in int8 and streamed.
                All but what the weights themselves hold is checked before they are read.
        """
        enable_compilation_cache()
        checkpoint = read_checkpoint(path)
        cls.check_config(checkpoint.config)
        mesh = make_mesh(mesh) if isinstance(mesh, str) else mesh
        if isinstance(encoder_mesh, str):
            encoder_mesh = make_mesh(encoder_mesh, mesh.devices.flat)
        batch_size = checked_batch_size(batch_size, mesh, encoder_mesh or mesh)
        tokenizer = Tokenizer(checkpoint.path / "tokenizer")
        meshes = dict.fromkeys(COMPONENTS, mesh) | {"text_encoder": encoder_mesh or mesh}
        modules = load_components(
            checkpoint,
            meshes,
            dtype,
            param_dtype,
            verify,
            text_encoder_form(int8_text_encoder, stream_text_encoder),
            components,
        )
        return cls(
            checkpoint.config,
            tokenizer,
            modules,
            mesh,
            batch_size,
            checkpoint.fingerprint,
            component_digests(checkpoint),
            encoder_mesh,
        )

    @classmethod
    def from_pipe(
        cls,
        pipe: "LoadedModel",
        path: str | None = None,
        *,
        release: bool = False,
        verify: bool | None = None,
    ) -> Self:
        """A pipeline for another task with the same modules; none is copied.

        Args:
            path: another checkpoint, as of Flash or of inpainting. Of it only those components are
                loaded whose weights are not the same as those of `pipe`, in the same dtypes.
            release: first take the components that are not shared away from `pipe`, which then
                cannot make images any more: memory never has to hold both U-Nets.
            verify: see `from_pretrained`.
        """
        config, tokenizer = pipe.config, pipe.tokenizer
        fingerprint, digests = pipe.fingerprint, pipe.digests
        if path is None:
            modules = {name: getattr(pipe, name) for name in COMPONENTS}
        else:
            checkpoint = read_checkpoint(path)
            cls.check_config(checkpoint.config)
            config, fingerprint = checkpoint.config, checkpoint.fingerprint
            digests = component_digests(checkpoint)
            modules = share_components(pipe, checkpoint, release, verify)
            if modules["text_encoder"] is not pipe.text_encoder:
                tokenizer = Tokenizer(checkpoint.path / "tokenizer")
        run = (pipe.mesh, pipe.batch_size, fingerprint, digests, pipe.encoder_mesh)
        made = cls(config, tokenizer, modules, *run)
        if made.unet is pipe.unet:
            made._unet_without_lora = pipe._unet_without_lora
        made.long_prompts = pipe.long_prompts
        made.preview = pipe.preview if made.movq is pipe.movq else None
        return made

    def release(self, component: str) -> None:
        """Lets go of a component's memory, unless another pipeline holds it too."""
        setattr(self, component, None)
        if component == "unet":
            self._unet_without_lora = None

    def load_lora(self, path: str, scale: float = 1.0) -> Lora:
        """Lays a LoRA over the U-Net, in place of the one before. Another scale compiles nothing.

        Args:
            path: the LoRA's folder.
            scale: strength; 1 as it was trained, 0 as without it.

        Returns:
            What was read.

        Raises:
            ValueError: not a LoRA, damaged, or of another architecture.
        """
        loaded = load_lora(path)
        factor = adapters.update_factor(loaded.config, scale)
        unet = self.unet if self._unet_without_lora is None else self._unet_without_lora
        adapters.check_fits(loaded.weights, unet, loaded.config, where=f"The LoRA {loaded.path}")
        warn_of_another_base(loaded, self.fingerprint)
        shardings = adapters.lora_shardings(unet, loaded.weights, self.mesh)
        self.unet = adapters.apply(unet, jax.tree.map(place, loaded.weights, shardings), factor)
        self._unet_without_lora = unet
        return loaded

    def unload_lora(self) -> None:
        """The U-Net as it was before `load_lora`."""
        if self._unet_without_lora is not None:
            self.unet, self._unet_without_lora = self._unet_without_lora, None

    def computing(self, module: nnx.Module) -> contextlib.AbstractContextManager:
        """The context in which programs of a component are called; see `programs.computing`.

        Raises:
            ValueError: the pipeline does not have it.
        """
        if module is None:
            raise ValueError(
                "this pipeline lacks a component that this takes: it was made without it, or "
                "released it to another pipeline (from_pipe with release=True)."
            )
        encoder = module is self.text_encoder
        return computing(self.encoder_mesh if encoder else self.mesh, module.dtype)

    def mesh_of(self, component: str) -> jax.sharding.Mesh:
        """The mesh that a component's weights lie on."""
        return self.encoder_mesh if component == "text_encoder" else self.mesh
