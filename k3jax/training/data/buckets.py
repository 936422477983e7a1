# SPDX-License-Identifier: Apache-2.0
"""Aspect-ratio buckets: a few sizes for images of every shape (as in NovelAI's SDXL training).

`bucket_index` reads the headers of all images once and assigns their buckets; `read_image` decodes
an image and resizes it to its bucket.
"""

import contextlib
import io
import itertools
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from k3jax.images import decoding as image_files
from k3jax.images import reading
from k3jax.training.data.source import READERS, Source
from k3jax.training.run_files import write_whole
from k3jax.training.train_config import DataConfig


MAX_RATIO = 2.0
MULTIPLE = 64
HEADER_PART = 256  # headers that a thread reads in one go


class EnlargedWarning(UserWarning):
    """Images are smaller than what they are trained at."""


@dataclass(frozen=True)
class BucketIndex:
    """Attributes:
    buckets: (height, width) of each.
    bucket_of: int32 (n,), the bucket of each sample.
    num_enlarged: samples smaller than their bucket.
    source_fingerprint: of the source, if there is a cache.
    """

    buckets: list[tuple[int, int]]
    bucket_of: np.ndarray
    num_enlarged: int
    source_fingerprint: str = ""

    def size(self, sample: int) -> tuple[int, int]:
        """(height, width) at which a sample is seen."""
        return self.buckets[self.bucket_of[sample]]


def make_buckets(
    resolution: int, max_ratio: float = MAX_RATIO, multiple: int = MULTIPLE
) -> list[tuple[int, int]]:
    """Sizes (height, width) that cannot grow on either side, from tall to wide.

    Args:
        resolution: no bucket has a larger area than a square of this side, which is one of them.
        max_ratio: of the longer side to the shorter.
        multiple: of all sides; what the U-Net can halve.
    """
    check_resolution(resolution, multiple)
    if max_ratio < 1:
        raise ValueError(f"max_ratio is {max_ratio}; it must be 1 or more.")

    def fits(h: int, w: int) -> bool:
        return h * w <= resolution**2 and max(h, w) <= max_ratio * min(h, w)

    longest = int(resolution * max_ratio**0.5)
    sides = range(multiple, longest + 1, multiple)
    return sorted(
        (
            (h, w)
            for h, w in itertools.product(sides, sides)
            if fits(h, w) and not fits(h + multiple, w) and not fits(h, w + multiple)
        ),
        key=lambda size: (size[1] / size[0], size),
    )


def check_resolution(resolution: int, multiple: int = MULTIPLE) -> None:
    """Refuses a side that is no multiple of `multiple`."""
    if resolution < multiple or resolution % multiple:
        near = max(multiple, round(resolution / multiple) * multiple)
        raise ValueError(
            f"resolution is {resolution}; it must be a positive multiple of {multiple} "
            f"(the nearest is {near})."
        )


def assign(width, height, buckets: list[tuple[int, int]]) -> np.ndarray:
    """The bucket whose ratio is nearest, on a logarithmic scale; of equals the taller one.

    Args:
        width, height: pixels of one image, or arrays (n,).

    Returns:
        int32, () or (n,).
    """
    h, w = np.array(buckets, np.float64).T
    ratios = np.log(w / h)
    order = np.argsort(ratios, kind="stable").astype(np.int32)
    borders = (ratios[order][1:] + ratios[order][:-1]) / 2
    ratio = np.log(np.asarray(width, np.float64) / np.asarray(height, np.float64))
    return order[np.searchsorted(borders, ratio)]


def scale(width, height, size: tuple[int, int]) -> np.ndarray:
    """The factor by which images are resized to cover (height, width) `size`; above 1: enlarged."""
    return np.maximum(size[0] / np.asarray(height), size[1] / np.asarray(width))


def bucket_index(source: Source, config: DataConfig, multiple: int = MULTIPLE) -> BucketIndex:
    """Reads the sizes of all images and assigns buckets; the empty buckets are left out.

    With a `config.cache`, sizes and the source's fingerprint are stored in a file in that folder,
    named after the sizes and times of the source's files.

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
        sizes, fingerprint = _stored_sizes(source, Path(config.cache))
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


def _stored_sizes(source: Source, cache: Path) -> tuple[np.ndarray, str]:
    """(sizes of all images, fingerprint of the source), from a file in the folder of caches."""
    stamp = source.stamp()
    file, older = cache / f"{stamp}.sizes.npz", cache.with_name(f"{cache.name}.sizes.npz")
    for path in (file, older):  # older versions had one file beside the cache
        with contextlib.suppress(Exception), np.load(path) as stored:  # a damaged one is replaced
            if stored["stamp"] == stamp and len(stored["sizes"]) == len(source):
                return stored["sizes"], str(stored["fingerprint"])
    sizes, fingerprint = image_sizes(source), source.fingerprint()
    arrays = {"stamp": stamp, "fingerprint": fingerprint, "sizes": sizes}
    write_whole(file, lambda out: np.savez(out, **arrays))
    return sizes, fingerprint


def read_size(file: BinaryIO, key: str) -> tuple[int, int]:
    """(width, height) as the image is to be seen, from its header only.

    Raises:
        ValueError: the file is no image that Pillow knows; `key` names it.
    """
    return image_files.read_size(file, f"image {key}")


def decode(data: bytes, key: str) -> Image.Image:
    """An RGB image: upright, transparency on white, 16 bits rounded to 8, the first of several.

    Raises:
        ValueError: the file cannot be read; `key` names it.
    """
    name = f"image {key}"
    image = image_files.load_image(io.BytesIO(data), name)
    if image.mode == "F":
        raise ValueError(
            f"{name} cannot be read (its pixels are floating-point numbers of an unknown range): "
            "save it as PNG or JPEG, or leave it out."
        )
    return Image.fromarray(reading.read_image(image, name))


def fit(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """The centre of an image at the scale at which it covers (height, width) `size`.

    Lanczos, which Pillow widens as it makes smaller, so nothing aliases.

    Returns:
        uint8 (height, width, 3).
    """
    height, width = size
    w, h = image.size
    factor = max(width / w, height / h)
    seen_w, seen_h = min(w, width / factor), min(h, height / factor)
    left, top = (w - seen_w) / 2, (h - seen_h) / 2
    box = (left, top, min(w, left + seen_w), min(h, top + seen_h))  # a rounding error is refused
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box))
