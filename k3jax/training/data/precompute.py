# SPDX-License-Identifier: Apache-2.0
"""Latents and text embeddings of a whole data set, computed once by the frozen components."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from k3jax.checkpoints.restore import Checkpoint, restore
from k3jax.model.context import PromptEmbeds, window_length
from k3jax.model.inpainting_inputs import inpainting_inputs
from k3jax.model.movq import MoVQ
from k3jax.model.tokenizer import Tokenizer
from k3jax.pipelines.components import component_digests
from k3jax.pipelines.programs import computing, encode_text
from k3jax.sharding import batch_sharding, make_mesh
from k3jax.training.data.buckets import BucketIndex, bucket_index
from k3jax.training.data.latent_cache_writer import LatentCache, cache_fingerprint
from k3jax.training.data.source import Source
from k3jax.training.data.training_data import trimmed
from k3jax.training.run_files import only_run
from k3jax.training.tasks.denoising import encode_images
from k3jax.training.tasks.inpainting import draw_masks
from k3jax.training.train_config import DataConfig, TrainConfig


IMAGES_PER_DEVICE = 8


def open_cache(
    config: TrainConfig,
    checkpoint: Checkpoint,
    source: Source,
    index: BucketIndex,
    tokenizer: Tokenizer,
    progress: bool,
) -> LatentCache:
    """The cache at `config.data.cache`, computed now if it is not there.

    For inpainting the mask and the latents of the masked image lie behind the clean latents, 9
    channels in all: each image has one mask, drawn from a hash of its pixels.
    """
    digests = component_digests(checkpoint)  # whatever U-Net stands beside them
    used = (digests["movq"], digests["text_encoder"])
    weights = ",".join((*used, config.frozen_dtype, config.task, str(config.masks)))
    cache = LatentCache(config.data.cache, cache_fingerprint(source, index, weights))
    if cache.complete:
        return cache
    lock = cache.folder.with_name(f".{cache.folder.name}.lock")
    busy = (
        f"another process is computing {cache.folder} now: wait for it to end, or set "
        "train.data.cache to another folder."
    )
    with only_run(lock, busy):
        _compute(cache, config, checkpoint, source, index, tokenizer, progress)
    return cache


def index_of(source: Source, config: DataConfig) -> BucketIndex:
    """`bucket_index` on every process; what is kept beside a cache is read by the first alone."""
    first = jax.process_index() == 0 or config.cache is None
    if not first:
        _barrier()
    index = bucket_index(source, config)
    if first and config.cache is not None:
        _barrier()
    return index


def _compute(
    cache: LatentCache,
    config: TrainConfig,
    checkpoint: Checkpoint,
    source: Source,
    index: BucketIndex,
    tokenizer: Tokenizer,
    progress: bool,
) -> None:
    """Makes the cache, or what is left of it."""
    mesh = make_mesh("data=-1", jax.local_devices())
    kwargs = dict(mesh=mesh, param_dtype=config.frozen_dtype, dtype=config.frozen_dtype)
    movq = restore(checkpoint, "movq", **kwargs)
    encoder = restore(checkpoint, "text_encoder", **kwargs)
    split = batch_sharding(mesh)

    def images(batch: np.ndarray) -> np.ndarray:
        if config.task != "inpainting":
            with computing(mesh, movq.dtype):
                return np.asarray(_latents(movq, jax.device_put(batch, split)))
        rngs = (np.random.default_rng(zlib.crc32(image.tobytes())) for image in batch)
        masks = [
            draw_masks(image[None], rng, config.masks)
            for image, rng in zip(batch, rngs, strict=True)
        ]
        given = jax.device_put((batch, np.concatenate(masks)), split)
        with computing(mesh, movq.dtype):
            return np.asarray(_inpainting_latents(movq, *given))

    def texts(captions: list[str]) -> PromptEmbeds:
        ids, mask = trimmed(*tokenizer(captions))
        with computing(mesh, encoder.dtype):
            embeds = encode_text(encoder, *jax.device_put((ids, mask), split))
        lengths = np.asarray(window_length(mask.sum(1)), np.int32)
        return PromptEmbeds(np.asarray(embeds, np.float32), mask, lengths)

    with tqdm(unit="sample", desc="latents and embeddings", disable=not progress) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        cache.precompute(
            source,
            index,
            images,
            texts,
            IMAGES_PER_DEVICE * len(jax.local_devices()),
            num_workers=config.data.num_workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            barrier=_barrier,
            progress=show,
        )


@jax.jit
def _latents(movq: MoVQ, images: jax.Array) -> jax.Array:
    return encode_images(movq, images)


@jax.jit
def _inpainting_latents(movq: MoVQ, images: jax.Array, masks: jax.Array) -> jax.Array:
    mask, masked = inpainting_inputs(images, masks, movq.encode)
    return jnp.concatenate([encode_images(movq, images), mask, masked], axis=-1)


def _barrier() -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("k3jax training cache")
