# SPDX-License-Identifier: Apache-2.0
"""The model at work: texts of the coming shards are encoded, images of the present one made.

Where all weights fit the devices, a thread encodes the next shard while this one is made. Where
they do not (one small chip), the run alternates: encode several shards, drop the encoder, load the
rest, make those shards.
"""

import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np

from k3jax.model.abstract import COMPONENTS
from k3jax.pipelines.pipeline import BasePipeline
from k3jax.sharding import data_parallelism
from k3jax.synthesis.embeddings import Embeddings
from k3jax.synthesis.image_task import Inputs, make_images
from k3jax.synthesis.planning import Batch, ShardPlan, texts_of
from k3jax.synthesis.run_manifest import Settings


ALL = tuple(COMPONENTS)
ENCODER = ("text_encoder",)
DENOISER = tuple(name for name in COMPONENTS if name != "text_encoder")
TEXTS_AT_ONCE = 64  # 128 MB of float32 embeddings at full size, before they are cut

Load = Callable[[Sequence[str]], BasePipeline]
"""Makes a pipeline with these components; those left out are None."""


@dataclass(frozen=True)
class PreparedShard:
    plan: ShardPlan
    embeddings: Embeddings


class Phases:
    """Shards ready to be made, one after the other, and the pipeline that makes them.

    Nobody else keeps the pipeline: between two phases its memory must be free.
    """

    def __init__(
        self,
        load: Load,
        settings: Settings,
        plans: Callable[[], Iterator[ShardPlan]],
        shards_per_phase: int | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ):
        """
        Args:
            plans: starts the shards to be made; read one shard ahead, in another thread.
            shards_per_phase: alternate, with so many shards in memory; None: all weights together.
            stopped: whether to leave off.
        """
        self._load, self._settings, self._plans = load, settings, plans
        self._shards_per_phase, self._stopped = shards_per_phase, stopped
        self._pipe: BasePipeline | None = None
        self.made_on: dict[str, Any] = {}

    def __iter__(self) -> Iterator[PreparedShard]:
        alternate = self._shards_per_phase is not None
        plans = self._plans()
        first = next(plans, None)
        if first is None:
            return  # no weights are loaded for nothing
        plans = itertools.chain([first], plans)
        yield from self._alternating(plans) if alternate else self._together(plans)
        self._pipe = None

    def make(
        self, prepared: PreparedShard, batch: Batch, inputs: Sequence[Inputs] | None = None
    ) -> Sequence[np.ndarray]:
        """The images of a batch, each float32 (h, w, 3) in [0, 1]; NaN where the model failed.

        Args:
            inputs: what they start from, for an image task.
        """
        settings, embeddings = self._settings, prepared.embeddings
        arguments = {"prompt_embeds": embeddings.of([s.prompt for s in batch.samples])}
        if batch.bucket.negative:
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
            "num_inference_steps": settings.sampler.num_inference_steps,
            "sampler": settings.sampler.name,
            "eta": settings.sampler.eta,
            "guidance_interval": settings.guidance_interval,
            "output_type": "np",
            "progress_bar": False,
        }
        bucket = batch.bucket
        with self._turn:
            if inputs is not None:
                images = make_images(self._pipe, bucket.task, batch.samples, inputs, arguments)
            else:
                images = self._pipe(height=bucket.height, width=bucket.width, **arguments).images
        if not failed.any():
            return images
        nothing = np.full_like(images[0], np.nan)
        return [nothing if bad else image for bad, image in zip(failed, images, strict=True)]

    def _together(self, plans: Iterator[ShardPlan]) -> Iterator[PreparedShard]:
        self._take(self._load(ALL))
        with ThreadPoolExecutor(1, "encode") as pool:

            def following():
                plan = next(plans, None)
                return None if plan is None else self._prepare(plan)

            ahead = pool.submit(following)
            while (prepared := ahead.result()) is not None:
                ahead = pool.submit(following)
                yield prepared

    def _alternating(self, plans: Iterator[ShardPlan]) -> Iterator[PreparedShard]:
        while group := list(itertools.islice(plans, self._shards_per_phase)):
            self._take(self._load(ENCODER))
            prepared = [self._prepare(plan) for plan in group]
            self._drop()
            self._take(self._load(DENOISER))
            yield from prepared
            self._drop()

    def _prepare(self, plan: ShardPlan) -> PreparedShard:
        texts, embeddings = texts_of(plan), Embeddings()
        size = self._pipe.batch_size
        step = -(-TEXTS_AT_ONCE // size) * size
        for first in range(0, len(texts), step):
            if self._stopped():
                break
            part = texts[first : first + step]
            with self._turn:
                embeddings.add(part, self._pipe.encode_prompt(part))
        return PreparedShard(plan, embeddings)

    def _take(self, pipe: BasePipeline) -> None:
        self._pipe, mesh, encoder = pipe, pipe.mesh, pipe.encoder_mesh
        self.made_on |= {
            "device": mesh.devices.flat[0].device_kind,
            "images_per_device": pipe.batch_size // data_parallelism(mesh),
            "mesh": {axis: mesh.shape[axis] for axis in ("fsdp", "tensor")},
        }
        if encoder != mesh:
            self.made_on["encoder_mesh"] = {a: encoder.shape[a] for a in ("fsdp", "tensor")}
        # Two programs with collectives, started by two threads, could reach the devices in
        # different orders, and wait for each other for ever.
        collectives = any(m.shape["fsdp"] * m.shape["tensor"] > 1 for m in (mesh, encoder))
        self._turn = Lock() if collectives else nullcontext()

    def _drop(self) -> None:
        self._pipe = None
        gc.collect()
