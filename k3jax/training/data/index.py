# SPDX-License-Identifier: Apache-2.0
"""The bucket of every sample, from the headers of its images, read once."""

import contextlib
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from k3jax.training.config import DataConfig
from k3jax.training.data.buckets import MULTIPLE, assign, check_resolution, make_buckets, scale
from k3jax.training.data.decode import decode, fit, read_size
from k3jax.training.data.source import Source


HEADER_THREADS = 8
HEADER_PART = 256  # headers that a thread reads in one go


class EnlargedWarning(UserWarning):
    """Images are smaller than what they are trained at."""


@dataclass(frozen=True)
class BucketIndex:
    """Attributes:
    buckets: (height, width) of each.
    bucket_of: int32 (n,), the bucket of each sample.
    num_enlarged: samples smaller than their bucket.
    """

    buckets: list[tuple[int, int]]
    bucket_of: np.ndarray
    num_enlarged: int

    def size(self, sample: int) -> tuple[int, int]:
        """(height, width) at which a sample is seen."""
        return self.buckets[self.bucket_of[sample]]


def bucket_index(source: Source, config: DataConfig, multiple: int = MULTIPLE) -> BucketIndex:
    """Reads the sizes of all images and assigns buckets; the empty buckets are left out.

    Sizes are kept in a file beside `config.cache`, where there is one.

    Raises:
        ValueError: an image is not readable; the message has its key.
    """
    if config.aspect_buckets:
        buckets = make_buckets(config.resolution, multiple=multiple)
    else:
        check_resolution(config.resolution, multiple)
        buckets = [(config.resolution, config.resolution)]
    if source.size is not None:
        h, w = source.size
        sizes = np.broadcast_to(np.int32([w, h]), (len(source), 2))
    else:
        sizes = image_sizes(source, _sizes_file(config.cache))
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
    return BucketIndex([buckets[b] for b in used], bucket_of.astype(np.int32), int(enlarged.sum()))


def image_sizes(source: Source, file: Path | None = None) -> np.ndarray:
    """int32 (n, 2): (width, height) of all images, upright; from `file` if it is of this source."""
    fingerprint = source.fingerprint() if file is not None else ""
    if file is not None and file.is_file():
        with contextlib.suppress(Exception), np.load(file) as stored:  # a broken one is made anew
            if stored["fingerprint"] == fingerprint and len(stored["sizes"]) == len(source):
                return stored["sizes"]

    sizes = np.empty((len(source), 2), np.int32)

    def read(first: int) -> None:
        for number in range(first, min(first + HEADER_PART, len(source))):
            with source.open(number) as image:
                sizes[number] = read_size(image, source.key(number))

    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        for done in pool.map(read, range(0, len(source), HEADER_PART)):
            del done  # asked for because that raises what reading raised
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f".{file.name}.{os.getpid()}.part")
        with open(part, "wb") as out:
            np.savez(out, fingerprint=fingerprint, sizes=sizes)
        os.replace(part, file)
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


def _sizes_file(cache: str | None) -> Path | None:
    return None if cache is None else Path(cache).with_name(f"{Path(cache).name}.sizes.npz")
