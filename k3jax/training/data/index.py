# SPDX-License-Identifier: Apache-2.0
"""The bucket of every sample, from the headers of its images, read once."""

import contextlib
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from k3jax.training.data.buckets import MULTIPLE, assign, check_resolution, make_buckets, scale
from k3jax.training.data.decode import decode, fit, read_size
from k3jax.training.data.source import READERS, Source
from k3jax.training.run_files import write_whole
from k3jax.training.train_config import DataConfig


HEADER_PART = 256  # headers that a thread reads in one go


class EnlargedWarning(UserWarning):
    """Images are smaller than what they are trained at."""


@dataclass(frozen=True)
class BucketIndex:
    """Attributes:
    buckets: (height, width) of each.
    bucket_of: int32 (n,), the bucket of each sample.
    num_enlarged: samples smaller than their bucket.
    source_fingerprint: of the source, where a cache is wanted.
    """

    buckets: list[tuple[int, int]]
    bucket_of: np.ndarray
    num_enlarged: int
    source_fingerprint: str = ""

    def size(self, sample: int) -> tuple[int, int]:
        """(height, width) at which a sample is seen."""
        return self.buckets[self.bucket_of[sample]]


def bucket_index(source: Source, config: DataConfig, multiple: int = MULTIPLE) -> BucketIndex:
    """Reads the sizes of all images and assigns buckets; the empty buckets are left out.

    Where there is a `config.cache`, sizes and the source's fingerprint are kept in a file beside
    it, and made anew when a file of the source has another size or time.

    Raises:
        ValueError: an image is not readable; the message has its key.
    """
    if config.aspect_buckets:
        buckets = make_buckets(config.resolution, multiple=multiple)
    else:
        check_resolution(config.resolution, multiple)
        buckets = [(config.resolution, config.resolution)]
    fingerprint = ""
    if source.size is not None:
        h, w = source.size
        sizes = np.broadcast_to(np.int32([w, h]), (len(source), 2))
        fingerprint = source.fingerprint() if config.cache is not None else ""
    elif config.cache is not None:
        sizes, fingerprint = _kept(source, Path(config.cache))
    else:
        sizes = image_sizes(source)
    bucket_of = assign(sizes[:, 0], sizes[:, 1], buckets)
    targets = np.array(buckets)[bucket_of]
    enlarged = scale(sizes[:, 0], sizes[:, 1], targets.T) > 1
    if enlarged.any():
        worst = int(scale(sizes[:, 0], sizes[:, 1], targets.T).argmax())
        warnings.warn(
            f"{enlarged.sum()} of {len(source)} images are smaller than the size they are trained "
            f"at, and are enlarged; the smallest is {source.key(worst)} "
            f"({sizes[worst, 0]}x{sizes[worst, 1]}).",
            EnlargedWarning,
            stacklevel=3,
        )
    used, bucket_of = np.unique(bucket_of, return_inverse=True)
    buckets, bucket_of = [buckets[b] for b in used], bucket_of.astype(np.int32)
    return BucketIndex(buckets, bucket_of, int(enlarged.sum()), fingerprint)


def image_sizes(source: Source) -> np.ndarray:
    """int32 (n, 2): (width, height) of all images, upright."""
    sizes = np.empty((len(source), 2), np.int32)

    def read(first: int) -> None:
        for number in range(first, min(first + HEADER_PART, len(source))):
            with source.open(number) as image:
                sizes[number] = read_size(image, source.key(number))

    with ThreadPoolExecutor(READERS) as pool:
        for done in pool.map(read, range(0, len(source), HEADER_PART)):
            del done  # asked for because that raises what reading raised
    return sizes


def read_image(source: Source, index: BucketIndex, number: int) -> dict[str, Any]:
    """Sample `number`: its image uint8 (h, w, 3) of its bucket's size, caption and key."""
    sample = source[number]
    size = index.size(number)
    image = sample.image
    if isinstance(image, bytes):
        image = fit(decode(image, sample.key), size)
    elif image.shape[:2] != size:
        raise ValueError(f"image {sample.key} is {image.shape[:2]}; its bucket is {size}.")
    return {"image": image, "caption": sample.caption, "key": sample.key}


def _kept(source: Source, cache: Path) -> tuple[np.ndarray, str]:
    """(sizes of all images, fingerprint of the source), from a file beside the cache if it is of
    this source."""
    file, stamp = cache.with_name(f"{cache.name}.sizes.npz"), source.stamp()
    if file.is_file():
        with contextlib.suppress(Exception), np.load(file) as stored:  # a broken one is made anew
            if stored["stamp"] == stamp and len(stored["sizes"]) == len(source):
                return stored["sizes"], str(stored["fingerprint"])
    sizes, fingerprint = image_sizes(source), source.fingerprint()
    arrays = {"stamp": stamp, "fingerprint": fingerprint, "sizes": sizes}
    write_whole(file, lambda out: np.savez(out, **arrays))
    return sizes, fingerprint
