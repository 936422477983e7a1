# SPDX-License-Identifier: Apache-2.0
"""Computes the cache of latents and text embeddings with the frozen components."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding
from tqdm import tqdm

from k3jax.checkpoints.format import Checkpoint
from k3jax.checkpoints.restore import restore
from k3jax.model.context import PromptEmbeds, window_length
from k3jax.model.movq import MoVQ
from k3jax.model.tokenizer import Tokenizer
from k3jax.pipelines.loading import component_digests
from k3jax.pipelines.programs import computing, encode_text
from k3jax.sharding import batch_sharding, make_mesh
from k3jax.training.data.buckets import BucketIndex, bucket_index
from k3jax.training.data.latent_cache import LatentCache, cache_folder, trimmed
from k3jax.training.data.latent_cache_writer import cache_fingerprint, write_cache
from k3jax.training.data.source import Source
from k3jax.training.run_files import exclusive_lock
from k3jax.training.train_config import DataConfig, TrainConfig


IMAGES_PER_DEVICE = 8

EncodeImages = Callable[[MoVQ, np.ndarray, NamedSharding], jax.Array]
"""(autoencoder, uint8 (b, h, w, 3), sharding of inputs) -> what the cache holds of images."""


def open_cache(
    config: TrainConfig,
    task: str,
    checkpoint: Checkpoint,
    source: Source,
    index: BucketIndex,
    tokenizer: Tokenizer,
    encode_images: EncodeImages,
    progress: bool,
) -> LatentCache:
    """The cache of a data set in `config.data.cache`; computes it if it does not exist.

    Args:
        task: its name; tasks with other latents have caches of their own.
    """
    digests = component_digests(checkpoint)  # the U-Net does not matter
    parts = (digests["movq"], digests["text_encoder"], config.frozen_dtype, task, str(config.masks))
    fingerprint = cache_fingerprint(source, index, ",".join(parts))
    cache = LatentCache(cache_folder(config.data.cache, fingerprint), fingerprint)
    if cache.complete:
        return cache
    lock = cache.folder.with_name(f".{cache.folder.name}.lock")
    busy = (
        f"another process is computing {cache.folder} now: wait for it to end, or set "
        "train.data.cache to another folder."
    )
    with exclusive_lock(lock, busy):
        _compute(cache, config, checkpoint, source, index, tokenizer, encode_images, progress)
    return cache


def index_of(source: Source, config: DataConfig) -> BucketIndex:
    """`bucket_index` on every process; only the first one reads the file that is kept of it."""
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
    encode_images: EncodeImages,
    progress: bool,
) -> None:
    """Fills the cache, or what is missing of it."""
    mesh = make_mesh("data=-1", jax.local_devices())
    kwargs = dict(mesh=mesh, param_dtype=config.frozen_dtype, dtype=config.frozen_dtype)
    movq = restore(checkpoint, "movq", **kwargs)
    encoder = restore(checkpoint, "text_encoder", **kwargs)
    split = batch_sharding(mesh)

    def images(batch: np.ndarray) -> np.ndarray:
        with computing(mesh, movq.dtype):
            return np.asarray(encode_images(movq, batch, split))

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

        write_cache(
            cache,
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


def _barrier() -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("k3jax training cache")
