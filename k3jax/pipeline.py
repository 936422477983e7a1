# SPDX-License-Identifier: Apache-2.0
"""Text to image: prompt -> tokens -> embeddings -> context -> latents -> images."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from k3jax import request
from k3jax.abstract import COMPONENTS
from k3jax.checkpoint import read_checkpoint, restore
from k3jax.compilation_cache import enable_compilation_cache
from k3jax.config import ModelConfig, SamplerName
from k3jax.denoising import denoise_program, initial_carry, loop_rows, sample_keys
from k3jax.programs import (
    decode_latents,
    encode_text,
    image_splits,
    initial_latents,
    make_contexts,
)
from k3jax.request import Images, OutputType
from k3jax.samplers import Sampler, make_sampler
from k3jax.sharding import batch_sharding, data_parallelism, make_mesh
from k3jax.text_projection import PromptEmbeds, window_length
from k3jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class Output:
    """`images`: a list of PIL images; for "np" float32 (b, h, w, 3) in [0, 1]; for "latent" float32
    (b, h/8, w/8, 4)."""

    images: Any


class Kandinsky3Pipeline:
    """Text to image with a Kandinsky 3 checkpoint. Argument names are those of diffusers.

    An image is a function of the weights, its prompts, its seed, its size and the sampler settings;
    not of the batch, the mesh, or its place in a call.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        components: dict[str, Any],
        mesh: jax.sharding.Mesh,
        batch_size: int | None = None,
    ):
        """
        Args:
            components: the modules by the names in `k3jax.abstract.COMPONENTS`, on `mesh`.
            batch_size: images per compiled batch over the whole mesh; one per device by default. A
                call of any other size is cut into such batches, the last one padded.
        """
        request.check_text_to_image(config)
        self.config, self.tokenizer, self.mesh = config, tokenizer, mesh
        self.text_encoder = components["text_encoder"]
        self.text_projection = components["text_projection"]
        self.unet = components["unet"]
        self.movq = components["movq"]
        self.batch_size = data_parallelism(mesh) if batch_size is None else batch_size
        image_splits(mesh, self.batch_size)

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        mesh: str | jax.sharding.Mesh = "data=-1",
        dtype: str = "bfloat16",
        param_dtype: str | None = None,
        batch_size: int | None = None,
        verify: bool | None = None,
    ) -> "Kandinsky3Pipeline":
        """Loads a checkpoint made by `k3jax convert`, straight into the mesh's shardings.

        Args:
            path: the checkpoint's folder.
            mesh: a mesh, or axis sizes such as "data=-1,tensor=2".
            dtype: of the computation, "bfloat16" or "float32".
            param_dtype: of the weights; that of the computation by default.
            verify: check the files' checksums first; see `k3jax.checkpoint.restore`.

        Raises:
            CheckpointError: not a checkpoint, damaged, or of another architecture.
            ValueError: a mesh that does not divide the devices.
        """
        enable_compilation_cache()
        checkpoint = read_checkpoint(path)
        mesh = make_mesh(mesh) if isinstance(mesh, str) else mesh
        dtypes = [jnp.dtype(dtype), jnp.dtype(param_dtype or dtype)]
        for wanted in dtypes:
            if wanted not in (jnp.bfloat16, jnp.float32):
                raise ValueError(f"dtype {wanted} is not one of bfloat16, float32.")
        tokenizer = Tokenizer(checkpoint.path / "tokenizer")
        components = {
            name: restore(
                checkpoint, name, mesh=mesh, param_dtype=dtypes[1], dtype=dtypes[0], verify=verify
            )
            for name in COMPONENTS
        }
        return cls(checkpoint.config, tokenizer, components, mesh, batch_size)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str | None] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] = 0,
        sampler: SamplerName | None = None,
        eta: float | None = None,
        guidance_interval: tuple[int, int] | None = None,
        latents: np.ndarray | None = None,
        step_noise: np.ndarray | None = None,
        prompt_embeds: PromptEmbeds | None = None,
        negative_prompt_embeds: PromptEmbeds | None = None,
        output_type: OutputType = "pil",
        progress_bar: bool = True,
    ) -> Output:
        """Makes images; those of one prompt stand side by side.

        Args:
            prompt: one or several; or give `prompt_embeds` from `encode_prompt`.
            negative_prompt: what to guide away from: one for all prompts, or one (or None) each.
            height, width: pixels, multiples of 64; the checkpoint's own size (1024) by default.
            num_inference_steps, guidance_scale, sampler, eta: the checkpoint's own by default.
                The guided noise is (w + 1) conditional - w unconditional, at any w of 0 or more; 0
                costs one forward pass a step. `guidance_scale` may be one per image.
            num_images_per_prompt: images of each prompt.
            seed: image k gets seed + k; or one seed per image.
            guidance_interval: first and last step, counted from 0, that are guided; the others cost
                one forward pass.
            latents: (b, h/8, w/8, 4) instead of the drawn initial noise.
            step_noise: (steps, b, h/8, w/8, 4) instead of the noise drawn at each step.
            output_type: "pil", "np" or "latent"; see `Output`.

        Raises:
            ValueError: one sentence on the argument that is wrong, before anything is compiled.
        """
        height = self.config.sample_size if height is None else height
        width = self.config.sample_size if width is None else width
        request.check_size(self.config, height, width)
        if output_type not in ("pil", "np", "latent"):
            raise ValueError(f"output_type {output_type!r} is not one of pil, np, latent.")
        settings = request.override(
            self.config.sampler, name=sampler, num_inference_steps=num_inference_steps, eta=eta
        )
        if guidance_scale is None:
            guidance_scale = settings.guidance_scale
        loop = make_sampler(settings)
        rows = loop_rows(loop, guidance_interval)
        factor = self.config.movq.scale_factor
        shape = (height // factor, width // factor, self.config.movq.latent_channels)

        embeds = (prompt_embeds, negative_prompt_embeds)
        prompts, negatives = request.texts(self.config, prompt, negative_prompt, *embeds)
        prompt_of = request.prompt_of_image(len(negatives), num_images_per_prompt)
        count = len(prompt_of)
        scales = request.guidance_scales(guidance_scale, count)
        key_data = sample_keys(request.image_seeds(seed, count))
        request.check_noise(latents, step_noise, shape, count, loop.num_steps)

        # Everything is checked; from here on it takes time.
        encoded = self._encoded(prompts, negatives, *embeds)
        images = request.spread(prompt_of, *encoded, scales, key_data, latents, step_noise)
        batches = -(-len(images) // self.batch_size)
        with tqdm(
            total=batches * loop.num_steps, unit="step", disable=not progress_bar, leave=False
        ) as bar:
            parts = []
            for index, kept in self._batches(len(images)):
                batch = images.rows(index)
                with self._precision():
                    made = self._make_batch(batch, loop, rows, shape, output_type, bar)
                parts.append(np.asarray(made)[:kept])
        return _output(parts, output_type)

    def encode_prompt(self, prompts: str | Sequence[str]) -> PromptEmbeds:
        """Embeddings of prompts with masks and lengths, on the host; float32.

        They can be passed back as `prompt_embeds` or `negative_prompt_embeds`, to this pipeline or
        any other with the same text encoder.
        """
        prompts = request.prompt_list(prompts)
        input_ids, attention_mask = self.tokenizer(prompts)
        parts = []
        for index, kept in self._batches(len(prompts)):
            ids, mask = self._put(input_ids[index]), self._put(attention_mask[index])
            with self._precision():
                embeds = encode_text(self.text_encoder, ids, mask)
            parts.append(np.asarray(embeds, np.float32)[:kept])
        lengths = np.asarray(window_length(attention_mask.sum(1)), np.int32)
        return PromptEmbeds(np.concatenate(parts), attention_mask, lengths)

    def decode(self, latents: np.ndarray, output_type: OutputType = "pil") -> Output:
        """Images of latents (b, h/8, w/8, 4), as "pil" or "np"."""
        parts = []
        for index, kept in self._batches(len(latents)):
            with self._precision():
                images = self._decode(self._put(latents[index]), output_type)
            parts.append(np.asarray(images)[:kept])
        return _output(parts, output_type)

    def _encoded(self, prompts, negatives, prompt_embeds, negative_embeds):
        """(embeddings, those of the negatives or None, which prompts have a negative).

        Each distinct text is encoded once, prompts and negatives in one go.
        """
        texts = list(dict.fromkeys([*prompts, *(n for n in negatives if n is not None)]))
        encoded = self.encode_prompt(texts) if texts else None
        place = {text: row for row, text in enumerate(texts)}
        if prompt_embeds is None:
            prompt_embeds = encoded[np.array([place[p] for p in prompts])]
        has_negative = np.array([n is not None for n in negatives])
        if negative_embeds is not None:
            has_negative = np.ones(len(prompt_embeds), bool)
        elif has_negative.any():
            negative_embeds = encoded[np.array([place.get(n, 0) for n in negatives])]
        return prompt_embeds, negative_embeds, has_negative

    def _make_batch(
        self,
        batch: Images,
        sampler: Sampler,
        rows: dict[str, np.ndarray],
        shape: tuple[int, int, int],
        output_type: OutputType,
        bar: tqdm,
    ) -> jax.Array:
        """One compiled batch, from embeddings to images (or latents), on the devices."""
        guided = sampler.guided and bool((batch.guidance_scale > 0).any())
        context, unconditional = make_contexts(
            self.text_projection,
            self._put(batch.prompt),
            self._put(batch.negative),
            self._put(batch.has_negative),
            conditioning=self.config.conditioning,
        )
        keys = self._put(batch.key_data)
        if batch.latents is None:
            latents = initial_latents(keys, shape=shape)
        else:
            latents = self._put(batch.latents.astype(np.float32))
        step_noise = batch.step_noise
        guidance_scale = self._put(batch.guidance_scale) if guided else None
        if not guided:
            rows = {name: column for name, column in rows.items() if name != "guide"}

        # Put where they belong before each call: the compiler may leave its results split in
        # another way, which as arguments would make another program.
        carry = self._put(initial_carry(sampler, latents))
        window = _window(sampler.num_steps)
        for first in range(0, sampler.num_steps, window):
            part = slice(first, first + window)
            after = denoise_program(
                self.unet,
                context,
                unconditional if guided else None,
                guidance_scale,
                None,
                carry,
                {name: jnp.asarray(column[part]) for name, column in rows.items()},
                keys,
                None if step_noise is None else self._put(step_noise[part], batch_dim=1),
                step=sampler.step,
                stochastic=sampler.stochastic,
                renoise=sampler.renoise,
            )
            # Waits for the window before this one, so that the device always has the next queued.
            jax.block_until_ready(carry[0])
            bar.update(0 if first == 0 else window)
            carry = self._put(after)
        jax.block_until_ready(carry[0])
        bar.update(window)
        return carry[0] if output_type == "latent" else self._decode(carry[0], output_type)

    def _decode(self, latents: jax.Array, output_type: OutputType) -> jax.Array:
        splits = image_splits(self.mesh, latents.shape[0])
        return decode_latents(self.movq, latents, splits=splits, as_uint8=output_type == "pil")

    def _batches(self, count: int) -> Iterator[tuple[np.ndarray, int]]:
        """(rows of a compiled batch, how many of them count); the last batch repeats its last."""
        for first in range(0, count, self.batch_size):
            rows = np.arange(first, first + self.batch_size)
            yield np.minimum(rows, count - 1), count - first

    def _precision(self) -> contextlib.AbstractContextManager:
        """float32 in full: TPUs and GPUs multiply it in bfloat16 or TF32 unless told otherwise."""
        if self.unet.dtype == jnp.float32:
            return jax.default_matmul_precision("highest")
        return contextlib.nullcontext()

    def _put(self, tree, batch_dim: int = 0):
        """Host arrays onto the mesh, split along the batch."""
        return jax.device_put(tree, batch_sharding(self.mesh, batch_dim))


def _output(parts: list[np.ndarray], output_type: OutputType) -> Output:
    images = np.concatenate(parts)
    return Output([Image.fromarray(i) for i in images] if output_type == "pil" else images)


def _window(num_steps: int) -> int:
    """Steps per call of the compiled loop: about a fifth of them, dividing them evenly.

    Between the calls the host can show progress. A callback from inside the scan would do so too,
    but programs with host callbacks are left out of the persistent compilation cache.
    """
    return next(w for w in range(max(num_steps // 5, 1), 0, -1) if num_steps % w == 0)
