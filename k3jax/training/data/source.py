# SPDX-License-Identifier: Apache-2.0
"""What a data set is: samples by number; and the data set of drawn scenes."""

import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from k3jax.scenes.caption import captioned


CROP_SHIFT = 0.45
"""Largest distance from the centre of a crop to that of its object, in sides of the crop."""

READERS = 8
"""Threads that read files or headers."""

IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Example:
    """A picture and what it shows.

    Attributes:
        key: name of the sample, unique in its source.
        image: the bytes of an image file, or uint8 (h, w, 3) of a drawn scene.
        caption: not empty.
    """

    key: str
    image: bytes | np.ndarray
    caption: str


class Source(ABC):
    """Samples by number, in a fixed order, from any thread; can be pickled for worker processes.

    The constructor checks everything that needs no decoding of images.
    """

    size: tuple[int, int] | None = None
    """(height, width) of all images, if it is known."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of samples."""

    @abstractmethod
    def key(self, number: int) -> str:
        """The name of a sample."""

    @abstractmethod
    def caption(self, number: int) -> str:
        """The caption of a sample."""

    @abstractmethod
    def open(self, number: int) -> BinaryIO:
        """A sample's image file, at its beginning."""

    @abstractmethod
    def rows(self) -> Iterable[tuple]:
        """What identifies the samples apart from the contents of files: keys, captions."""

    def files(self) -> list[str]:
        """Paths of the files that images are read from."""
        return []

    def fingerprint(self) -> str:
        """A hash of everything that a cache of this source depends on. Reads all files.

        A copy of the files has the same fingerprint.
        """
        with ThreadPoolExecutor(READERS) as pool:
            return hash_rows([*self.rows(), *zip(pool.map(_digest, self.files()), strict=True)])

    def stamp(self) -> str:
        """A hash of sizes and times of the files; it changes whenever `fingerprint` may change."""
        return hash_rows([*self.rows(), *map(_size_and_time, self.files())])

    def __getitem__(self, number: int) -> Example:
        if not 0 <= number < len(self):
            raise IndexError(f"there is no sample {number} of {len(self)}.")
        with self.open(number) as file:
            return Example(self.key(number), file.read(), self.caption(number))


class SceneSource(Source):
    """The drawn scenes of `k3jax.scenes`: square, all of one size."""

    def __init__(
        self, count: int, size: int, split: str = "train", seed: int = 0, mix: str = "all"
    ):
        self.size = (size, size)
        self._count, self._split, self._seed, self._mix = count, split, seed, mix

    def __len__(self) -> int:
        return self._count

    def key(self, number: int) -> str:
        return f"{self._split}-{number:08d}"

    def caption(self, number: int) -> str:
        return self[number].caption

    def open(self, number: int) -> BinaryIO:
        raise io.UnsupportedOperation("a scene has no file.")

    def __getitem__(self, number: int) -> Example:
        if not 0 <= number < len(self):
            raise IndexError(f"there is no sample {number} of {len(self)}.")
        image, caption, _ = captioned(self._seed, number, self._split, self.size[0], self._mix)
        return Example(self.key(number), image, caption)

    def rows(self) -> list[tuple]:
        # Only the first scenes: drawing all takes as long as training on them.
        first = [self[number] for number in range(min(8, self._count))]
        rows = [(sample.key, sample.caption, sample.image.tobytes()) for sample in first]
        return [(self._count, self.size, self._split, self._seed), *rows]


class SceneCropSource(SceneSource):
    """Squares of `crop` pixels, each around a random object of a scene of `size` pixels.

    For an autoencoder: most of a whole scene is background.
    """

    def __init__(self, count: int, size: int, split: str, seed: int, mix: str, crop: int):
        super().__init__(count, size, split, seed, mix)
        if not 0 < crop <= size:
            raise ValueError(
                f"data.crop is {crop}; it must be between 1 and the {size} of a scene."
            )
        self._scene_size, self._crop, self.size = size, crop, (crop, crop)

    def __getitem__(self, number: int) -> Example:
        image, caption, scene = captioned(
            self._seed, number, self._split, self._scene_size, self._mix
        )
        rng = np.random.default_rng([self._seed, number, 2])
        item = scene.objects[rng.integers(len(scene.objects))]
        shift = rng.uniform(-CROP_SHIFT * self._crop, CROP_SHIFT * self._crop, 2)
        corner = np.round(np.asarray(item.center) - self._crop / 2 + shift)
        x, y = np.clip(corner, 0, self._scene_size - self._crop).astype(int)
        crop = image[y : y + self._crop, x : x + self._crop]
        return Example(self.key(number), np.ascontiguousarray(crop), caption)


def check_utf8(text: str, where: str) -> str:
    """The text itself; it was decoded with `surrogateescape`.

    Raises:
        ValueError: it has bytes of another encoding, or the zero bytes of UTF-16.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        pass
    else:
        if "\0" not in text:
            return text
    raise ValueError(
        f"{where} is not UTF-8: save it as UTF-8 (of Latin-1: iconv -f LATIN1 -t UTF-8)."
    )


def hash_rows(rows: Iterable[tuple]) -> str:
    """A hash of tuples of texts, bytes and numbers."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()[:16]


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size_and_time(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns
