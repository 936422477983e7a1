# SPDX-License-Identifier: Apache-2.0
"""What all pipelines share: what turns texts and images into embeddings and latents, and latents
into images, in batches of one size.

What they run on is loaded in loaded_model.py; the tasks are in pipeline.py, img2img.py and
inpaint.py, the loop that they run in generation.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from PIL import Image

from k3jax.images.reading import read_images
from k3jax.model.context import PromptEmbeds, window_length
from k3jax.pipelines import call_inputs
from k3jax.pipelines.call_inputs import OutputType
from k3jax.pipelines.loaded_model import LoadedModel
from k3jax.pipelines.programs import decode_latents, encode_images, image_splits
from k3jax.pipelines.prompts import LongPrompts, join_windows, plain_prompts
from k3jax.pipelines.streaming import encode_batches
from k3jax.sharding import batch_sharding, fetch, place


@dataclass(frozen=True)
class Output:
    """`images`: a list of PIL images; for "np" float32 (b, h, w, 3) in [0, 1]; for "latent" float32
    (b, h/8, w/8, 4). Arrays of several sizes come as a list."""

    images: Any


class BasePipeline(LoadedModel):
    """A loaded model that encodes prompts and images, and decodes latents."""

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
        prompts = call_inputs.prompt_list(prompts)
        policy = self.long_prompts if long_prompts is None else long_prompts
        windows = plain_prompts(self.tokenizer, prompts, policy, word_weights)
        ids, mask = windows.input_ids, windows.attention_mask
        batches = list(self.batches(len(ids)))
        with self.computing(self.text_encoder):
            texts = [(ids[rows], mask[rows]) for rows, _ in batches]
            encoded = encode_batches(self.text_encoder, texts, self.encoder_mesh)
            pairs = zip(encoded, batches, strict=True)
            parts = [embeds[:kept].astype(np.float32) for embeds, (_, kept) in pairs]
        lengths = np.asarray(window_length(mask.sum(1)), np.int32)
        embeds = PromptEmbeds(np.concatenate(parts), mask, lengths, windows.token_weights)
        return join_windows(embeds, windows.prompt_of)

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
        parts = []
        for index, kept in self.batches(len(images)):
            batch = self.put(images[index])
            with self.computing(self.movq):
                splits = image_splits(self.mesh, len(index))
                parts.append(fetch(encode_images(self.movq, batch, splits=splits))[:kept])
        return np.concatenate(parts)

    def decode(self, latents: np.ndarray, output_type: OutputType = "pil") -> Output:
        """Images of latents (b, h/8, w/8, 4), as "pil" or "np".

        Raises:
            ValueError: latents of another shape, or that are not finite; another output type.
        """
        if output_type not in ("pil", "np"):
            raise ValueError(f"output_type is {output_type!r}; decode makes 'pil' or 'np'.")
        latents = call_inputs.check_latents(latents, self.config, "latents")
        return output(self.decode_arrays(latents, output_type), output_type)

    def decode_arrays(self, latents: np.ndarray, output_type: OutputType) -> np.ndarray:
        """As `decode_batch`, of any number of latents."""
        parts = []
        for index, kept in self.batches(len(latents)):
            images = self.decode_batch(self.put(latents[index]), output_type)
            parts.append(fetch(images)[:kept])
        return np.concatenate(parts)

    def decode_batch(self, latents: jax.Array, output_type: OutputType) -> jax.Array:
        """Images of one compiled batch, uint8 for "pil", float32 for "np"."""
        splits = image_splits(self.mesh, latents.shape[0])
        with self.computing(self.movq):
            return decode_latents(self.movq, latents, splits=splits, as_uint8=output_type == "pil")

    def compile_decoder(self, shape: tuple[int, int, int], output_type: OutputType) -> None:
        """Compiles what `decode_batch` runs for latents (h, w, c) of each image."""
        latents = self.put(np.zeros((self.batch_size, *shape), np.float32))
        with self.computing(self.movq):
            splits, as_uint8 = image_splits(self.mesh, self.batch_size), output_type == "pil"
            decode_latents.lower(self.movq, latents, splits=splits, as_uint8=as_uint8).compile()

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
