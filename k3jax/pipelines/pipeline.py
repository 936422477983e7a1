# SPDX-License-Identifier: Apache-2.0
"""What all pipelines share: a checkpoint's components on a mesh, which encode prompts and images
and decode latents, in batches of one size.

The tasks are in text_to_image.py, image_to_image.py and inpaint.py; the loop is in generation.py.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import numpy as np
from flax import nnx
from PIL import Image

from k3jax.arguments import check_choice, check_texts
from k3jax.checkpoints.format import Checkpoint, read_checkpoint
from k3jax.config import COMPONENTS, AttentionForm, ModelConfig
from k3jax.images.reading import read_images
from k3jax.model.context import PromptEmbeds
from k3jax.model.tokenizer import Tokenizer
from k3jax.pipelines.adapters import AdaptedUNet
from k3jax.pipelines.call_inputs import CallInputs, check_latents
from k3jax.pipelines.compilation_cache import enable_compilation_cache
from k3jax.pipelines.load_options import LoadOptions
from k3jax.pipelines.loading import (
    checked_batch_size,
    load_checkpoint,
    share_checkpoint,
)
from k3jax.pipelines.option_fields import takes
from k3jax.pipelines.options import CallOptions, OutputType
from k3jax.pipelines.preview import preview_map
from k3jax.pipelines.programs import computing, decode_latents, encode_images, image_splits
from k3jax.pipelines.prompts import LongPrompts, Windows, join_windows, plain_prompts
from k3jax.pipelines.streaming import encode_batches
from k3jax.sharding import batch_sharding, fetch, place


LACKS = (
    "this pipeline lacks a component that this takes: it was loaded without it, or released it to "
    "another pipeline (from_pipe with release=True)."
)


@dataclass(frozen=True)
class Output:
    """The images of a call.

    Attributes:
        images: a list of PIL images; for "np" float32 (b, h, w, 3) in [0, 1]; for "latent" float32
            (b, h/8, w/8, 4). Arrays of several sizes come as a list.
    """

    images: Any


class BasePipeline(AdaptedUNet):
    """The components of a checkpoint on a mesh.

    Attributes:
        text_encoder, text_projection, unet, movq: the modules. Pipelines may share them.
        batch_size: images per compiled batch over the whole mesh; may be set.
        long_prompts: what is done with prompts of more than 128 tokens; may be set. "truncate" cuts
            them off with a warning, "error" refuses them, "average" encodes them in parts and takes
            the mean of the parts at each position.
    """

    call_inputs: ClassVar[Callable[[CallOptions, ModelConfig], CallInputs]]
    """Checks the options of a call for a checkpoint's config, without the weights."""

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        components: dict[str, Any],
        mesh: jax.sharding.Mesh,
        batch_size: int | None = None,
        fingerprint: str | None = None,
        digests: Mapping[str, str] | None = None,
        encoder_mesh: jax.sharding.Mesh | None = None,
        long_prompts: LongPrompts = "truncate",
        attention: AttentionForm = "auto",
    ):
        """
        Args:
            tokenizer: None for a pipeline without a text encoder.
            components: the modules by the names in `k3jax.config.COMPONENTS`, on `mesh`;
                None for those that this pipeline is to do without.
            batch_size: images per compiled batch over the whole mesh; one per device by default. A
                call of any other size is cut into such batches, the last one padded.
            fingerprint: the checkpoint's, which a LoRA is compared with.
            digests: of the components' weights, by which `from_pipe` knows equal ones.
            encoder_mesh: of the text encoder, over the same devices; `mesh` by default.
            attention: the form of it that other checkpoints are loaded with, in `from_pipe`.
        """
        self.check_config(config)
        self.config, self.tokenizer, self.mesh = config, tokenizer, mesh
        self.encoder_mesh = mesh if encoder_mesh is None else encoder_mesh
        self.fingerprint, self.digests = fingerprint, dict(digests or {})
        self.text_encoder = components["text_encoder"]
        self.text_projection = components["text_projection"]
        self.unet = components["unet"]
        self.movq = components["movq"]
        self._preview_map = None
        self.batch_size, self.long_prompts = batch_size, long_prompts
        self.attention = attention

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
    @takes(LoadOptions)
    def from_pretrained(cls, path: str | Checkpoint, options: LoadOptions) -> Self:
        """Loads a checkpoint made by `k3jax convert`, straight into the mesh's shardings.

        Args:
            path: the checkpoint's folder, or what `read_checkpoint` returned for it.
            OPTIONS

        Raises:
            CheckpointError: not a checkpoint, damaged, or of another architecture.
            ValueError: one sentence on the argument that is wrong, before the weights are read.
            TypeError: an argument that does not exist.
        """
        enable_compilation_cache()
        checkpoint = path if isinstance(path, Checkpoint) else read_checkpoint(path)
        cls.check_config(checkpoint.config)
        return cls(checkpoint.config, **load_checkpoint(checkpoint, options))

    @classmethod
    def from_pipe(
        cls,
        pipe: "BasePipeline",
        path: str | None = None,
        *,
        release: bool = False,
        verify: bool | None = None,
        batch_size: int | None = None,
    ) -> Self:
        """A pipeline for another task with the same modules; none is copied.

        Args:
            path: another checkpoint, as of Flash or of inpainting. Of it only those components are
                loaded whose weights are not the same as those of `pipe`, in the same dtypes.
            release: first release from `pipe` the components that are not shared; it then cannot
                generate images any more. Memory never has to hold both U-Nets.
            verify: see `from_pretrained`.
            batch_size: that of `pipe` by default.
        """
        if path is None:
            config = pipe.config
            own = {
                "tokenizer": pipe.tokenizer,
                "components": {name: getattr(pipe, name) for name in COMPONENTS},
                "fingerprint": pipe.fingerprint,
                "digests": pipe.digests,
            }
        else:
            checkpoint = read_checkpoint(path)
            config = checkpoint.config
            cls.check_config(config)
            own = share_checkpoint(pipe, checkpoint, release, verify)
        new = cls(
            config,
            **own,
            mesh=pipe.mesh,
            encoder_mesh=pipe.encoder_mesh,
            batch_size=pipe.batch_size if batch_size is None else batch_size,
            long_prompts=pipe.long_prompts,
            attention=pipe.attention,
        )
        if new.unet is pipe.unet:
            new._adapters = pipe._adapters
        if new.movq is pipe.movq:
            new._preview_map = pipe._preview_map
        return new

    def release(self, component: str) -> None:
        """Frees a component's memory, unless another pipeline holds it too."""
        setattr(self, component, None)
        if component == "unet":
            self._adapters = None

    def computing(self, module: nnx.Module) -> contextlib.AbstractContextManager:
        """The context in which programs of a component are called; see `programs.computing`.

        Raises:
            ValueError: the pipeline does not have it.
        """
        if module is None:
            raise ValueError(LACKS)
        encoder = module is self.text_encoder
        return computing(self.encoder_mesh if encoder else self.mesh, module.dtype)

    def encode_prompt(
        self,
        prompts: str | Sequence[str],
        *,
        word_weights: bool = False,
        long_prompts: LongPrompts | None = None,
    ) -> PromptEmbeds:
        """Embeddings of prompts with masks and lengths, on the host; float32.

        They can be passed back as `prompt_embeds` or `negative_prompt_embeds`, to this pipeline or
        any other with the same text encoder, also mixed (`k3jax.mix_prompts`).

        Args:
            word_weights: read "a (red:1.5) circle" as weights of words; see
                `k3jax.pipelines.prompts`.
            long_prompts: the pipeline's own by default.

        Raises:
            ValueError: a prompt that cannot be read, or is too long under the policy "error".
        """
        prompts = check_texts(prompts, "prompt")
        prompts = [prompts] if isinstance(prompts, str) else prompts
        names = [f"prompt {number}" for number in range(len(prompts))]
        return self.encode_windows(self.cut_texts(prompts, names, long_prompts, word_weights))

    def cut_texts(
        self,
        texts: Sequence[str],
        names: Sequence[str],
        policy: LongPrompts | None = None,
        word_weights: bool = False,
    ) -> Windows:
        """Texts as windows of tokens; see `plain_prompts`."""
        if self.tokenizer is None:
            raise ValueError(LACKS)
        policy = self.long_prompts if policy is None else policy
        return plain_prompts(self.tokenizer, texts, policy, word_weights, names)

    def encode_windows(self, windows: Windows) -> PromptEmbeds:
        """Embeddings of prompts that are cut into windows of tokens."""
        ids, mask = windows.input_ids, windows.attention_mask
        batches = list(self.batches(len(ids)))
        with self.computing(self.text_encoder):
            inputs = [(ids[rows], mask[rows]) for rows, _ in batches]
            encoded = encode_batches(self.text_encoder, inputs, self.encoder_mesh)
            pairs = zip(encoded, batches, strict=True)
            embeds = np.concatenate([rows[:kept].astype(np.float32) for rows, (_, kept) in pairs])
        return join_windows(windows, embeds)

    def encode_image(self, image: Any) -> np.ndarray:
        """Latents float32 (b, h/8, w/8, 4) of one image or several of one size.

        Args:
            image: see `k3jax.images.reading`; sides are multiples of 8.
        """
        images = read_images(image)
        if len({image.shape for image in images}) > 1:
            raise ValueError("the images are of several sizes: encode those of one size together.")
        factor = self.config.movq.scale_factor
        if images[0].shape[0] % factor or images[0].shape[1] % factor:
            height, width = images[0].shape[:2]
            raise ValueError(
                f"an image is {width} x {height}; sides must be multiples of {factor}."
            )
        return self.encode_arrays(np.stack(images))

    def encode_arrays(self, images: np.ndarray) -> np.ndarray:
        """Latents float32 (b, h/8, w/8, 4) of uint8 (b, h, w, 3)."""
        return self.in_batches(functools.partial(self.run_movq, encode_images), images)

    def decode(self, latents: np.ndarray, output_type: OutputType = "pil") -> Output:
        """Images of latents (b, h/8, w/8, 4), as "pil" or "np".

        Raises:
            ValueError: latents of another shape, or that are not finite; another output type.
        """
        check_choice(output_type, "output_type", ("pil", "np"))
        latents = check_latents(latents, self.config, "latents")
        return output(self.decode_arrays(latents, output_type), output_type)

    def decode_arrays(self, latents: np.ndarray, output_type: OutputType) -> np.ndarray:
        """As `decode_batch`, of any number of latents."""
        return self.in_batches(lambda batch: self.decode_batch(batch, output_type), latents)

    def decode_batch(self, latents: jax.Array, output_type: OutputType) -> jax.Array:
        """Images of one compiled batch, uint8 for "pil", float32 for "np"."""
        return self.run_movq(decode_latents, latents, as_uint8=output_type == "pil")

    def compile_decoder(self, shape: tuple[int, int, int], output_type: OutputType) -> None:
        """Compiles what `decode_batch` runs for latents (h, w, c) of each image."""
        latents = self.put(np.zeros((self.batch_size, *shape), np.float32))
        self.run_movq(decode_latents.lower, latents, as_uint8=output_type == "pil").compile()

    def run_movq(self, program: Callable, *batch: jax.Array, **static: Any) -> Any:
        """What a program of MoVQ returns for one compiled batch."""
        splits = image_splits(self.mesh, self.batch_size)
        with self.computing(self.movq):
            return program(self.movq, *batch, splits=splits, **static)

    def preview_map(self) -> np.ndarray:
        """The linear map from latents to the colours of previews; see `k3jax.pipelines.preview`."""
        if self._preview_map is None:
            with self.computing(self.movq):
                self._preview_map = preview_map(self.movq, self.digests.get("movq"))
        return self._preview_map

    def in_batches(self, program: Callable, *arrays: np.ndarray) -> np.ndarray:
        """What a program of one compiled batch returns for any number of rows, on the host."""
        parts = []
        for index, kept in self.batches(len(arrays[0])):
            batch = self.put(tuple(array[index] for array in arrays))
            parts.append(fetch(program(*batch))[:kept])
        return np.concatenate(parts)

    def batches(self, count: int) -> Iterator[tuple[np.ndarray, int]]:
        """(rows of a compiled batch, how many of them count); the last batch repeats its last."""
        for first in range(0, count, self.batch_size):
            rows = np.arange(first, first + self.batch_size)
            yield np.minimum(rows, count - 1), count - first

    def put(self, tree, batch_dim: int = 0):
        """Host arrays onto the mesh, split along the batch."""
        return place(tree, batch_sharding(self.mesh, batch_dim))


def output(images: np.ndarray | list[np.ndarray], output_type: OutputType) -> Output:
    """Arrays, one per image, as what a call returns."""
    if output_type == "pil":
        return Output([Image.fromarray(image) for image in images])
    one_size = len({image.shape for image in images}) == 1
    return Output(np.stack(images) if one_size else list(images))
