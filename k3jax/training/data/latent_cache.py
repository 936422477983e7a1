# SPDX-License-Identifier: Apache-2.0
"""The files of a cache of latents and text embeddings, written whole or not at all.

    manifest.json            what the cache is of, its buckets, shard size and dtype
    samples.npz              bucket and caption number of each sample
    keys.json                the key of each sample
    texts.npz                length and number of tokens of each caption
    latents/000012.npy       (m, h/8, w/8, 4), m samples of one bucket
    texts/000003.npy         (rows, d_model), the rows of m captions one after the other

Only different captions are kept, and of each only the rows that the model sees. Shards of a bucket
hold its samples in the order of the source. While it is made the folder is called NAME.partial, and
a shard is there once it is complete.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from k3jax.training.run_files import write_whole


FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What a cache is of.

    Attributes:
        fingerprint: of weights, source and sizes; the caller's.
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
    """The manifest of a cache, or of one that is being made; None: there is none.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        content = json.loads((folder / "manifest.json").read_text())
        if content.get("format") != FORMAT:
            raise ValueError(f"its format is {content.get('format')}, not {FORMAT}")
        return Manifest(**content)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} is not a cache of latents ({error}): delete it.") from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes manifest.json."""
    write_whole(
        folder / "manifest.json", lambda file: file.write(json.dumps(asdict(manifest)).encode())
    )


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
