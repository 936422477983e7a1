# SPDX-License-Identifier: Apache-2.0
"""What a data set is: samples by number, and the two kinds that need no format of their own."""

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from k3jax.scenes.caption import captioned


IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Sample:
    """A picture and what it shows.

    Attributes:
        key: names the sample; no other sample of its source has the same.
        image: an image file's bytes, or uint8 (h, w, 3) where it was drawn here.
        caption: not empty.
    """

    key: str
    image: bytes | np.ndarray
    caption: str


class Source(ABC):
    """Samples by number, in a fixed order, from any thread; can be pickled for worker processes.

    Whatever can be seen without decoding images is checked when a source is made.
    """

    size: tuple[int, int] | None = None
    """(height, width) of all images where it is known beforehand."""

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
        """A sample's image file, from its beginning; only what is read of it is fetched."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of what a cache of this source depends on: keys, captions, sizes of files."""

    def __getitem__(self, number: int) -> Sample:
        if not 0 <= number < len(self):
            raise IndexError(f"there is no sample {number} of {len(self)}.")
        with self.open(number) as file:
            return Sample(self.key(number), file.read(), self.caption(number))


class SceneSource(Source):
    """The drawn scenes of `k3jax.scenes`: square, of one size, and of any number."""

    def __init__(
        self, count: int, size: int, split: str = "train", seed: int = 0, mix: str = "all"
    ):
        if count < 1:
            raise ValueError(f"num_scenes is {count}; it must be 1 or more.")
        self.size = (size, size)
        self._count, self._split, self._seed, self._mix = count, split, seed, mix

    def __len__(self) -> int:
        return self._count

    def key(self, number: int) -> str:
        return f"{self._split}-{number:08d}"

    def caption(self, number: int) -> str:
        return self[number].caption

    def open(self, number: int) -> BinaryIO:
        raise io.UnsupportedOperation("a scene is drawn; there is no file of it.")

    def __getitem__(self, number: int) -> Sample:
        if not 0 <= number < len(self):
            raise IndexError(f"there is no sample {number} of {len(self)}.")
        image, caption, _ = captioned(self._seed, number, self._split, self.size[0], self._mix)
        return Sample(self.key(number), image, caption)

    def fingerprint(self) -> str:
        # Of the first scenes only: drawing all takes as long as training on them.
        first = [self[number] for number in range(min(8, self._count))]
        rows = [(sample.key, sample.caption, sample.image.tobytes()) for sample in first]
        return hash_rows([(self._count, self.size, self._split, self._seed), *rows])


def hash_rows(rows: Iterable[tuple]) -> str:
    """A hash of tuples of texts, bytes and numbers."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()[:16]
