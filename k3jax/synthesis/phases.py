# SPDX-License-Identifier: Apache-2.0
"""The model of a run: it encodes the texts of the next shards and computes images of this one.

Where all weights fit in device memory, a thread encodes the texts of the next shard during this
one. Where they do not (one small chip), the run alternates: it encodes the texts of several shards,
frees the text encoder, loads the rest, and computes their images.
"""

import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import Any

import ml_dtypes
import numpy as np

from k3jax.config import COMPONENTS, MAX_TOKENS
from k3jax.model.context import PromptEmbeds
from k3jax.pipelines.pipeline import BasePipeline
from k3jax.sharding import data_parallelism
from k3jax.synthesis.batches import Batch, ShardBatches, texts_of
from k3jax.synthesis.input_images import InputImages, images_from_inputs
from k3jax.synthesis.run_manifest import Settings


ALL = tuple(COMPONENTS)
ENCODER = ("text_encoder",)
DENOISER = tuple(name for name in COMPONENTS if name != "text_encoder")
TEXTS_AT_ONCE = 64  # 128 MB of float32 embeddings at full size, before they are cut

LoadPipeline = Callable[[Sequence[str]], BasePipeline]
"""Loads a pipeline with these components; the others are None."""


class Embeddings:
    """The text embeddings of a shard on the host, each text once, bit for bit.

    They are kept without padding, which comes back as zeros, and in bfloat16 where that loses
    nothing: 20 tokens are 0.16 MB, where 128 in float32 are 2 MB.
    """

    def __init__(self):
        self._rows: dict[str, np.ndarray] = {}
        self._lengths: dict[str, int] = {}
        self._cut: set[str] = set()
        self._shape = (0, 0)

    def add(self, texts: Sequence[str], embeds: PromptEmbeds, lengths: Sequence[int]) -> None:
        """Adds the embeddings of some texts, float32 (b, n, d_model), and how long they are."""
        self._shape = embeds.embeds.shape[1:]
        self._cut |= {text for text, n in zip(texts, lengths, strict=True) if n > MAX_TOKENS}
        for row, text in enumerate(texts):
            tokens = int(embeds.attention_mask[row].sum())
            self._rows[text] = _narrowed(np.asarray(embeds.embeds[row, :tokens]))
            self._lengths[text] = int(embeds.lengths[row])

    def tokens(self, text: str) -> int:
        """The number of tokens of a text that the model sees."""
        return len(self._rows[text])

    def is_cut(self, text: str) -> bool:
        """Whether a text has more tokens than the model sees."""
        return text in self._cut

    def of(self, texts: Sequence[str]) -> PromptEmbeds:
        """The embeddings of these texts, one row each, as the pipelines take them."""
        embeds = np.zeros((len(texts), *self._shape), np.float32)
        mask = np.zeros((len(texts), self._shape[0]), bool)
        for row, text in enumerate(texts):
            kept = self._rows[text]
            embeds[row, : len(kept)] = kept
            mask[row, : len(kept)] = True
        lengths = np.array([self._lengths[text] for text in texts], np.int32)
        return PromptEmbeds(embeds, mask, lengths)


@dataclass(frozen=True)
class EncodedShard:
    """A shard whose texts are encoded."""

    batches: ShardBatches
    embeddings: Embeddings


class Phases:
    """An iterator over encoded shards, and the pipeline that computes their images.

    No other object keeps the pipeline: between two phases its memory must be free.
    """

    def __init__(
        self,
        load: LoadPipeline,
        settings: Settings,
        shards: Callable[[], Iterator[ShardBatches]],
        shards_per_phase: int | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ):
        """
        Args:
            shards: starts the iteration; it is read one shard ahead, by another thread.
            shards_per_phase: alternate, with so many shards in memory; None: keep all weights.
            stopped: whether to stop encoding.
        """
        self._load, self._settings, self._shards = load, settings, shards
        self._shards_per_phase, self._stopped = shards_per_phase, stopped
        self._pipe: BasePipeline | None = None
        self.made_on: dict[str, Any] = {}

    def __iter__(self) -> Iterator[EncodedShard]:
        shards = self._shards()
        first = next(shards, None)
        if first is None:
            return  # without loading any weights
        shards = itertools.chain([first], shards)
        alternate = self._shards_per_phase is not None
        yield from self._alternating(shards) if alternate else self._together(shards)
        self._pipe = None

    def images(
        self, shard: EncodedShard, batch: Batch, inputs: Sequence[InputImages] | None = None
    ) -> Sequence[np.ndarray]:
        """The images of a batch, float32 (h, w, 3) in [0, 1]; NaN where the encoder failed.

        Args:
            inputs: the images that they start from; None for text to image.
        """
        embeddings = shard.embeddings
        arguments = {"prompt_embeds": embeddings.of([s.prompt for s in batch.samples])}
        if batch.kind.negative:
            negatives = [s.negative_prompt for s in batch.samples]
            arguments["negative_prompt_embeds"] = embeddings.of(negatives)
        # The pipeline refuses embeddings that are not finite; here they fail their samples alone.
        failed = np.zeros(len(batch.samples), bool)
        for embeds in arguments.values():
            rows = ~np.isfinite(embeds.embeds).all((1, 2))
            embeds.embeds[rows] = 0
            failed |= rows
        arguments |= {
            "seed": [s.seed for s in batch.samples],
            "guidance_scale": [s.guidance_scale for s in batch.samples],
            **self._settings.call_options,
            "output_type": "np",
            "progress_bar": False,
        }
        kind = batch.kind
        with self._turn:
            if inputs is not None:
                images = images_from_inputs(
                    self._pipe, kind.operation, batch.samples, inputs, arguments
                )
            else:
                images = self._pipe(height=kind.height, width=kind.width, **arguments).images
        if not failed.any():
            return images
        nothing = np.full_like(images[0], np.nan)
        return [nothing if bad else image for bad, image in zip(failed, images, strict=True)]

    def _together(self, shards: Iterator[ShardBatches]) -> Iterator[EncodedShard]:
        self._take(self._load(ALL))
        with ThreadPoolExecutor(1, "encode") as pool:

            def following():
                shard = next(shards, None)
                return None if shard is None else self._encode(shard)

            ahead = pool.submit(following)
            while (encoded := ahead.result()) is not None:
                ahead = pool.submit(following)
                yield encoded

    def _alternating(self, shards: Iterator[ShardBatches]) -> Iterator[EncodedShard]:
        while group := list(itertools.islice(shards, self._shards_per_phase)):
            self._take(self._load(ENCODER))
            encoded = [self._encode(shard) for shard in group]
            self._drop()
            self._take(self._load(DENOISER))
            yield from encoded
            self._drop()

    def _encode(self, shard: ShardBatches) -> EncodedShard:
        texts, embeddings = texts_of(shard), Embeddings()
        size = self._pipe.batch_size
        step = -(-TEXTS_AT_ONCE // size) * size
        for first in range(0, len(texts), step):
            if self._stopped():
                break
            part = texts[first : first + step]
            with self._turn:
                embeds = self._pipe.encode_prompt(part)
            embeddings.add(part, embeds, [len(ids) for ids, _ in self._pipe.tokenizer.whole(part)])
        return EncodedShard(shard, embeddings)

    def _take(self, pipe: BasePipeline) -> None:
        self._pipe, mesh, encoder = pipe, pipe.mesh, pipe.encoder_mesh
        self.made_on |= {
            "device": mesh.devices.flat[0].device_kind,
            "images_per_device": pipe.batch_size // data_parallelism(mesh),
            "mesh": {axis: mesh.shape[axis] for axis in ("fsdp", "tensor")},
        }
        if encoder != mesh:
            self.made_on["encoder_mesh"] = {a: encoder.shape[a] for a in ("fsdp", "tensor")}
        # Two threads may start programs with collectives in another order on each device, and
        # these would wait for each other for ever.
        collectives = any(m.shape["fsdp"] * m.shape["tensor"] > 1 for m in (mesh, encoder))
        self._turn = Lock() if collectives else nullcontext()

    def _drop(self) -> None:
        self._pipe = None
        gc.collect()


def _narrowed(values: np.ndarray) -> np.ndarray:
    """A copy in bfloat16 where that loses nothing."""
    values = np.ascontiguousarray(values, np.float32)
    if (values.view(np.uint32) & 0xFFFF).any():
        return values.copy()
    return values.astype(ml_dtypes.bfloat16)
