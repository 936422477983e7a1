# SPDX-License-Identifier: Apache-2.0
"""A cache of latents and text embeddings: its files, and batches read from them.

    manifest.json            fingerprint, buckets, shard size and dtype
    samples.npz              bucket and caption number of each sample
    keys.json                the key of each sample
    texts.npz                length and number of tokens of each caption
    latents/000012.npy       (m, h/8, w/8, 4), m samples of one bucket
    texts/000003.npy         (rows, d_model), the rows of m captions one after the other

Equal captions are stored once, each with only the rows that the model sees. The shards of a bucket
hold its samples in the order of the source. While the cache is incomplete its folder is called
NAME.partial; a shard appears once it is complete.
"""

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from k3jax.training.data.loader import ENDLESS, BatchIterator, import_grain
from k3jax.training.data.order import Order
from k3jax.training.run_files import write_whole


FORMAT = 1
MANIFEST = "manifest.json"
TEXT_ROWS = (32, 64, 96, 128)
"""Numbers of rows that embeddings are padded to: few, since each is a compilation of the step."""
READ_THREADS = 2
BATCHES_AHEAD = 4


@dataclass(frozen=True)
class Manifest:
    """What a cache contains.

    Attributes:
        fingerprint: of weights, source and sizes; see `cache_fingerprint`.
        dtype: of latents and embeddings: float16 or float32.
        shard_size: samples of a shard; one of texts has a quarter as many captions.
        buckets: (height, width) in pixels of each.
        counts: samples of each bucket.
        num_captions: different captions.
    """

    fingerprint: str
    dtype: str
    shard_size: int
    buckets: list[list[int]]
    counts: list[int]
    num_captions: int
    format: int = FORMAT

    @property
    def text_shard_size(self) -> int:
        """Captions of a shard; an embedding is larger than the latent of a picture."""
        return max(1, self.shard_size // 4)

    def shards(self) -> list[tuple[int, int, int]]:
        """(bucket, first, last) of each shard of latents: `first` to `last` of its samples."""
        return [
            (bucket, first, min(first + self.shard_size, count))
            for bucket, count in enumerate(self.counts)
            for first in range(0, count, self.shard_size)
        ]

    def text_shards(self) -> list[tuple[int, int]]:
        """(first, last) caption of each shard of embeddings."""
        size = self.text_shard_size
        firsts = range(0, self.num_captions, size)
        return [(first, min(first + size, self.num_captions)) for first in firsts]


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a complete or incomplete cache; None: there is none.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text())
        if content.get("format") != FORMAT:
            raise ValueError(f"its format is {content.get('format')}, not {FORMAT}")
        return Manifest(**content)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} is not a cache of latents ({error}): delete it.") from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes manifest.json."""
    write_whole(folder / MANIFEST, lambda file: file.write(json.dumps(asdict(manifest)).encode()))


def write_array(path: Path, array: np.ndarray) -> None:
    """A .npy file."""
    write_whole(path, lambda file: np.lib.format.write_array(file, np.ascontiguousarray(array)))


def open_array(path: Path) -> np.ndarray:
    """A .npy file, mapped into memory.

    Raises:
        ValueError: it is missing or cut off.
    """
    try:
        # asarray, since indexing np.memmap itself costs microseconds a row.
        return np.asarray(np.load(path, mmap_mode="r"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): delete the cache, and the next run makes it again."
        ) from None


def latents_file(folder: Path, shard: int) -> Path:
    """The latents of shard `shard`."""
    return folder / "latents" / f"{shard:06d}.npy"


def texts_file(folder: Path, shard: int) -> Path:
    """The embeddings of text shard `shard`; its lengths have a file of their own until the end."""
    return folder / "texts" / f"{shard:06d}.npy"


def lengths_file(folder: Path, shard: int) -> Path:
    """int32 (m, 2) lengths and numbers of tokens; written after the embeddings."""
    return folder / "texts" / f"{shard:06d}.lengths.npy"


def to_dtype(array: Any, dtype: str, what: str) -> np.ndarray:
    """An array, of a device too, in the dtype of the cache.

    Raises:
        ValueError: something in it is no finite number, or is none in float16.
    """
    array = np.asarray(array)
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if not np.isfinite(cast).all():
        if np.isfinite(array.astype(np.float32)).all():
            raise ValueError(f"the {what} is too large for {dtype}: cache in float32.")
        raise ValueError(f"the {what} has values that are not finite numbers.")
    return cast


class LatentCache:
    """A folder of latents and embeddings of one data set.

    `write_cache` (k3jax/training/data/latent_cache_writer.py) fills it, `CachedLoader` reads it.

    Attributes:
        folder: of this cache alone; it appears when the cache is complete.
        partial: the folder while the cache is being written.
        fingerprint: of everything that the content depends on; see `cache_fingerprint`.
    """

    def __init__(self, folder: str | Path, fingerprint: str):
        """
        Raises:
            ValueError: the folder holds a cache of something else, or other files.
        """
        self.folder, self.fingerprint = Path(folder), fingerprint
        self.partial = self.folder.with_name(f"{self.folder.name}.partial")
        for place in (self.folder, self.partial):
            manifest = read_manifest(place)
            if manifest is not None and manifest.fingerprint != fingerprint:
                others = _differences(manifest.fingerprint, fingerprint)
                raise ValueError(
                    f"{place} was computed from {others} than this run's: delete it, or set "
                    "train.data.cache to another folder."
                )
        if not self.complete and self.folder.is_dir() and any(self.folder.iterdir()):
            raise ValueError(
                f"{self.folder} holds other files: name a folder for the cache that is new or "
                "empty."
            )

    @property
    def complete(self) -> bool:
        """Whether it can be read."""
        return (self.folder / MANIFEST).is_file()


def cache_folder(root: str | Path, fingerprint: str) -> Path:
    """The folder of one data set's cache in `root`, which holds the caches of many.

    That is `root` itself where a cache of this data set is directly in it: older versions wrote one
    cache per folder.
    """
    root = Path(root)
    for place in (root, root.with_name(f"{root.name}.partial")):
        with contextlib.suppress(ValueError):  # not a cache: it stays as it is
            manifest = read_manifest(place)
            if manifest is not None and manifest.fingerprint == fingerprint:
                return root
    return root / hashlib.sha256(fingerprint.encode()).hexdigest()[:16]


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
        folder, manifest = cache.folder, read_manifest(cache.folder)
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
        paths = (latents_file(folder, shard) for shard in range(len(manifest.shards())))
        self._latents = [open_array(path) for path in paths]
        paths = (texts_file(folder, shard) for shard in range(len(manifest.text_shards())))
        self._texts = [open_array(path) for path in paths]

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


def trimmed(ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows that the longest caption's window needs, rounded up to one of a few numbers.

    Rows outside of a caption's window take no part, so only the time changes.
    """
    needed = min(int(mask.sum(1).max()) + 1, TEXT_ROWS[-1])
    rows = next(n for n in TEXT_ROWS if n >= needed)
    return ids[:, :rows], mask[:, :rows]


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


def _differences(theirs: str, ours: str) -> str:
    """What differs between the fingerprints of two caches."""
    names = (
        "other weights, task or masks",
        "other images or captions (or by an older version)",
        "other sizes",
    )
    pairs = zip(names, theirs.split(";"), ours.split(";"), strict=False)
    return " and ".join(name for name, one, other in pairs if one != other) or names[-1]
