# SPDX-License-Identifier: Apache-2.0
"""Batches of a `LatentCache`, in the same order as a `Loader`'s would be."""

import json
from typing import Any

import numpy as np

from k3jax.training.data import latent_cache as files
from k3jax.training.data.latent_cache_writer import LatentCache
from k3jax.training.data.loader import ENDLESS, BatchIterator, import_grain
from k3jax.training.data.order import Order


TEXT_ROWS = (32, 64, 96, 128)
"""Numbers of rows that embeddings are padded to: few, since each is a compilation of the step."""
READ_THREADS = 2
BATCHES_AHEAD = 4


class CachedLoader(BatchIterator):
    """Batches of latents and text embeddings.

    A batch is a dict of latents (b, h/8, w/8, 4) and embeds (b, n, d_model), both in the dtype of
    the cache; attention_mask bool (b, n); lengths int32 (b,); keys, a list of b strings. n is the
    least of TEXT_ROWS that holds every caption of the batch on all processes; rows beyond a caption
    are 0.
    """

    def __init__(
        self,
        cache: LatentCache,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        *,
        shuffle: bool = True,
        samples: np.ndarray | None = None,
    ):
        """
        Args:
            batch_size: samples over all processes.
            samples: the numbers of those to be used; None: all.

        Raises:
            ValueError: the cache is not complete or damaged, or a number is out of range.
        """
        if not cache.complete:
            raise ValueError(f"{cache.folder} is not complete: precompute it first.")
        folder, manifest = cache.folder, files.read_manifest(cache.folder)
        with np.load(folder / "samples.npz") as arrays:
            bucket_of, self._caption_of = arrays["bucket"], arrays["caption"]
        with np.load(folder / "texts.npz") as arrays:
            self._lengths, self._tokens = arrays["lengths"], arrays["tokens"]
        self._keys = json.loads((folder / "keys.json").read_text())
        self.buckets = [tuple(bucket) for bucket in manifest.buckets]
        self._used = np.arange(len(bucket_of)) if samples is None else np.asarray(samples)
        order = Order(bucket_of[self._used], batch_size, seed, shuffle)
        super().__init__(order, process_index, process_count)

        self._shard, self._row = _places(bucket_of, manifest.counts, manifest.shard_size)
        size = manifest.text_shard_size
        self._text_shard = np.arange(len(self._lengths)) // size
        starts = np.cumsum(self._lengths) - self._lengths
        self._text_row = starts - starts[self._text_shard * size]
        paths = (files.latents_file(folder, shard) for shard in range(len(manifest.shards())))
        self._latents = [files.open_array(path) for path in paths]
        paths = (files.texts_file(folder, shard) for shard in range(len(manifest.text_shards())))
        self._texts = [files.open_array(path) for path in paths]

    def batch(self, number: int) -> dict[str, Any]:
        whole = self._used[self.order.batch(number)]
        rows = _text_rows(int(self._lengths[self._caption_of[whole]].max()))
        mine = whole[self._first : self._first + self._rows]
        captions = self._caption_of[mine]
        embeds, mask = self._embeds(captions, rows)
        return {
            "latents": self._latents_of(mine),
            "embeds": embeds,
            "attention_mask": mask,
            "lengths": self._lengths[captions],
            "keys": [self._keys[sample] for sample in mine],
        }

    def _dataset(self, number: int):
        grain = import_grain()
        batches = grain.MapDataset.range(number, ENDLESS).map(self.batch)
        return batches.to_iter_dataset(
            grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=BATCHES_AHEAD)
        )

    def _latents_of(self, samples: np.ndarray) -> np.ndarray:
        shards, rows = self._shard[samples].tolist(), self._row[samples].tolist()
        first = self._latents[shards[0]]
        latents = np.empty((len(samples), *first.shape[1:]), first.dtype)
        for i, (shard, row) in enumerate(zip(shards, rows, strict=True)):
            latents[i] = self._latents[shard][row]
        return latents

    def _embeds(self, captions: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
        first = self._texts[0]
        embeds = np.empty((len(captions), rows, first.shape[1]), first.dtype)
        places = zip(
            self._text_shard[captions].tolist(),
            self._text_row[captions].tolist(),
            self._lengths[captions].tolist(),
            strict=True,
        )
        for i, (shard, start, length) in enumerate(places):
            embeds[i, :length] = self._texts[shard][start : start + length]
            embeds[i, length:] = 0
        return embeds, np.arange(rows) < self._tokens[captions][:, None]


def _text_rows(length: int) -> int:
    for rows in TEXT_ROWS:
        if length <= rows:
            return rows
    raise ValueError(f"a caption of the cache has {length} rows; the model sees {TEXT_ROWS[-1]}.")


def _places(
    bucket_of: np.ndarray, counts: list[int], shard_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The shard of each sample, and its row in there."""
    place = np.empty(len(bucket_of), np.int64)
    first_shard = 0
    for bucket, count in enumerate(counts):
        members = np.flatnonzero(bucket_of == bucket)
        place[members] = first_shard * shard_size + np.arange(count)
        first_shard += -(-count // shard_size)
    return place // shard_size, place % shard_size
