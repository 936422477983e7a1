# SPDX-License-Identifier: Apache-2.0
"""Writes a cache of latents and text embeddings, shared out over the processes of a job."""

import json
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from k3jax.training.data import latent_cache as files
from k3jax.training.data.buckets import BucketIndex, read_image
from k3jax.training.data.latent_cache import LatentCache, Manifest
from k3jax.training.data.loader import read_ahead
from k3jax.training.data.source import Source
from k3jax.training.run_files import write_whole


SHARD_SIZE = 1024


def write_cache(
    cache: LatentCache,
    source: Source,
    index: BucketIndex,
    encode_images: Callable[[np.ndarray], Any],
    encode_texts: Callable[[list[str]], Any],
    batch_size: int,
    *,
    dtype: str = "float16",
    num_workers: int = 0,
    shard_size: int = SHARD_SIZE,
    process_index: int = 0,
    process_count: int = 1,
    barrier: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Computes the cache, or the missing part of an interrupted one; nothing if it is complete.

    The processes share the shards and the folder. Each calls the encoders
    for its own shards only, so these must not need another process.

    Args:
        encode_images: uint8 (batch_size, h, w, 3) -> latents (batch_size, h/8, w/8, 4).
        encode_texts: batch_size captions -> their PromptEmbeds.
        batch_size: of every call; the last of a shard is padded.
        dtype: float16 or float32.
        barrier: returns when every process has called it.
        progress: called after each shard with the samples and captions done, and all there are.

    Raises:
        ValueError: an image cannot be read, or an encoder's output is not finite.
    """
    if dtype not in ("float16", "float32"):
        raise ValueError(f"the dtype of a cache is float16 or float32, not {dtype}.")
    if cache.complete:
        return
    texts = [source.caption(number) for number in range(len(source))]
    captions = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    counts = np.bincount(index.bucket_of, minlength=len(index.buckets)).tolist()
    buckets = [list(bucket) for bucket in index.buckets]
    manifest = Manifest(cache.fingerprint, dtype, shard_size, buckets, counts, len(captions))
    _begin(cache.partial, manifest, process_index, barrier)
    work = _Shards(cache.partial, manifest, batch_size, process_index, process_count, progress)
    work.latents(source, index, encode_images, num_workers)
    work.texts(list(captions), encode_texts)
    barrier()
    if process_index == 0:
        bucket_of = index.bucket_of.astype(np.int32)
        caption_of = np.array([captions[text] for text in texts], np.int32)
        keys = [source.key(number) for number in range(len(source))]
        _finish(cache, manifest, bucket_of, caption_of, keys)
    barrier()


def _begin(partial: Path, manifest: Manifest, process_index: int, barrier) -> None:
    if process_index == 0:
        begun = files.read_manifest(partial)
        if begun is None:
            files.write_manifest(partial, manifest)
        elif begun != manifest:
            raise ValueError(
                f"{partial} was begun with other settings ({_difference(begun, manifest)}"
                "): use those again, or delete it."
            )
    barrier()


def _finish(cache: LatentCache, manifest: Manifest, bucket_of, caption_of, keys: list[str]) -> None:
    """Writes the small files, and renames the folder."""
    partial = cache.partial
    shards = range(len(manifest.text_shards()))
    rows = np.concatenate([np.load(files.lengths_file(partial, shard)) for shard in shards])
    arrays = {"lengths": rows[:, 0], "tokens": rows[:, 1]}
    write_whole(partial / "texts.npz", lambda file: np.savez(file, **arrays))
    arrays_of_samples = {"bucket": bucket_of, "caption": caption_of}
    write_whole(partial / "samples.npz", lambda file: np.savez(file, **arrays_of_samples))
    write_whole(partial / "keys.json", lambda file: file.write(json.dumps(keys).encode()))
    for path in partial.rglob(".*.part"):
        path.unlink()  # of a run that was killed while it wrote
    if cache.folder.is_dir():
        cache.folder.rmdir()  # it is empty
    os.replace(partial, cache.folder)
    for shard in shards:  # last, so that an interruption here costs nothing
        files.lengths_file(cache.folder, shard).unlink()


def cache_fingerprint(source: Source, index: BucketIndex, weights: str) -> str:
    """What a cache depends on.

    Args:
        weights: names the weights of both encoders, such as the hashes in a checkpoint's manifest,
            and the dtype they compute in.
    """
    sizes = ",".join(f"{h}x{w}" for h, w in index.buckets)
    assigned = zlib.crc32(index.bucket_of.astype(np.int32).tobytes())
    content = index.source_fingerprint or source.fingerprint()
    return f"weights={weights};source={content};sizes={sizes};{assigned:08x}"


class _Shards:
    """The shards that one process computes."""

    def __init__(self, folder, manifest, batch_size, process_index, process_count, progress):
        self._folder, self._manifest, self._batch_size = folder, manifest, batch_size
        self._mine = slice(process_index, None, process_count)
        self._progress = progress
        shards, texts = manifest.shards(), manifest.text_shards()
        mine = [*shards[self._mine], *texts[self._mine]]
        self._done, self._total = 0, sum(shard[-1] - shard[-2] for shard in mine)

    def latents(self, source: Source, index: BucketIndex, encode, num_workers: int) -> None:
        """Writes the latents that are missing."""
        members = [np.flatnonzero(index.bucket_of == b) for b in range(len(index.buckets))]
        todo, samples = [], []
        for shard, (bucket, first, last) in list(enumerate(self._manifest.shards()))[self._mine]:
            if files.latents_file(self._folder, shard).is_file():
                self._advance(last - first)
                continue
            todo.append((shard, last - first))
            rows = np.arange(first, last + -(last - first) % self._batch_size)
            samples.append(members[bucket][np.minimum(rows, last - 1)])
        if not todo:
            return
        read = _ReadImage(source, index, np.concatenate(samples))
        batches = iter(read_ahead(read, len(read.samples), self._batch_size, num_workers))
        try:
            for shard, count in todo:
                parts = []
                for _ in range(-(-count // self._batch_size)):
                    batch = next(batches)
                    what = f"latents of {', '.join(dict.fromkeys(batch['keys']))}"
                    latents = encode(batch["images"])
                    parts.append(files.to_dtype(latents, self._manifest.dtype, what))
                whole = np.concatenate(parts)[:count]
                files.write_array(files.latents_file(self._folder, shard), whole)
                self._advance(count)
        finally:
            batches.close()

    def texts(self, captions: Sequence[str], encode) -> None:
        """Writes the embeddings that are missing."""
        for shard, (first, last) in list(enumerate(self._manifest.text_shards()))[self._mine]:
            if not files.lengths_file(self._folder, shard).is_file():
                rows, lengths = [], []
                for start in range(first, last, self._batch_size):
                    batch = list(captions[start : min(last, start + self._batch_size)])
                    padded = batch + batch[-1:] * (self._batch_size - len(batch))
                    for kept, tokens in _rows(encode(padded), batch, self._manifest.dtype):
                        rows.append(kept)
                        lengths.append((len(kept), tokens))
                files.write_array(files.texts_file(self._folder, shard), np.concatenate(rows))
                lengths = np.array(lengths, np.int32)
                files.write_array(files.lengths_file(self._folder, shard), lengths)
            self._advance(last - first)

    def _advance(self, count: int) -> None:
        self._done += count
        self._progress(self._done, self._total)


class _ReadImage:
    """Position in a list of samples -> the sample, decoded."""

    def __init__(self, source: Source, index: BucketIndex, samples: np.ndarray):
        self._source, self._index, self.samples = source, index, samples

    def __call__(self, position: int) -> dict[str, Any]:
        return read_image(self._source, self._index, int(self.samples[position]))


def _rows(prompts, captions: list[str], dtype: str):
    """The rows inside the window of each caption, and how many of them are tokens."""
    mask = np.asarray(prompts.attention_mask).astype(bool)
    lengths = np.asarray(prompts.lengths)
    embeds = np.asarray(prompts.embeds)
    for row, caption in enumerate(captions):
        length, tokens = int(lengths[row]), int(mask[row].sum())
        if not mask[row, :tokens].all() or tokens > length:
            raise ValueError("the tokens of a prompt must be the first rows of its embeddings.")
        kept = np.zeros((length, embeds.shape[-1]), dtype)
        inside = embeds[row, :length]
        kept[: len(inside)] = files.to_dtype(inside, dtype, f"embedding of {caption!r}")
        yield kept, tokens


def _difference(begun: Manifest, ours: Manifest) -> str:
    pairs = [(name, getattr(begun, name), getattr(ours, name)) for name in vars(begun)]
    return "; ".join(f"{name} {there}, not {here}" for name, there, here in pairs if there != here)
