# SPDX-License-Identifier: Apache-2.0
"""Pixels -> the bytes of an image file: the same for the same pixels, without dates."""

import hashlib
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, features

from k3jax.images.decoding import opened


EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}
ROWS = 32
QUALITY = {"jpeg": 95, "png": None, "webp": 90}


@dataclass(frozen=True)
class ImageFormat:
    """How images are encoded.

    Attributes:
        name: "jpeg" (4:4:4), "png" or "webp".
        quality: 1 to 100 for lossy images; None: lossless.
    """

    name: str
    quality: int | None

    def __post_init__(self):
        if self.name not in EXTENSIONS:
            raise ValueError(f"image format {self.name!r} is not one of {', '.join(EXTENSIONS)}.")
        if self.name == "jpeg" and self.quality is None:
            raise ValueError("JPEG is never lossless: choose png, or webp.")
        if self.name == "png" and self.quality is not None:
            raise ValueError("PNG has no quality: it is lossless.")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ValueError(f"quality is {self.quality}; it must be between 1 and 100.")

    @property
    def extension(self) -> str:
        return EXTENSIONS[self.name]

    def encode(self, pixels: np.ndarray) -> bytes:
        """uint8 (h, w, 3) -> the content of a file."""
        if self.name == "jpeg":
            options = {"quality": self.quality, "subsampling": 0}
        elif self.name == "png":
            options = {"compress_level": 1}  # a sixth of the time of the usual 6, 5 % larger
        elif self.quality is None:
            options = {"lossless": True, "method": 0, "quality": 0}
        else:
            options = {"quality": self.quality, "method": 4}
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, self.name.upper(), **options)
        return file.getvalue()


@dataclass(frozen=True)
class EncodedImage:
    """An encoded image, or why there is none."""

    content: bytes | None
    sha256: str | None
    fault: str | None = None

    @property
    def size(self) -> int | None:
        return None if self.content is None else len(self.content)


def encode_image(image: np.ndarray, encoding: ImageFormat) -> EncodedImage:
    """float32 (h, w, 3) in [0, 1] -> the bytes of a file.

    An image that is not a number somewhere, and one that the encoder refuses, is a fault of that
    sample alone.
    """
    if not np.isfinite(np.sum(image)):  # values of 0 to 1 cannot overflow it
        bad = image.size - np.count_nonzero(np.isfinite(image))
        return EncodedImage(None, None, f"{bad} of the image's {image.size} values are not finite")
    try:
        content = encoding.encode(_as_uint8(image))
    except MemoryError:
        raise
    except Exception as error:
        return EncodedImage(None, None, f"the {encoding.name} encoder failed ({error!r})")
    return EncodedImage(content, hashlib.sha256(content).hexdigest())


def _as_uint8(image: np.ndarray) -> np.ndarray:
    """As `decode_latents` rounds, by rows that stay in the processor's cache."""
    pixels = np.empty(image.shape, np.uint8)
    for first in range(0, len(image), ROWS):
        rows = image[first : first + ROWS] * np.float32(255)
        pixels[first : first + ROWS] = np.rint(rows, out=rows)
    return pixels


def readable_fault(content: bytes, width: int, height: int) -> str | None:
    """Why the bytes are not an image of this size; None if they are."""
    try:
        with opened(io.BytesIO(content), "the image") as image:
            image.load()
            size = image.size
    except ValueError as error:
        return str(error)
    if size != (width, height):
        return f"is {size[0]}x{size[1]} and not {width}x{height}"
    return None


def codec_version() -> str:
    """Versions of the libraries that encode images."""
    names = ("jpg", "libjpeg_turbo", "zlib", "zlib_ng", "webp")
    return ", ".join(f"{name} {features.version(name)}" for name in names if features.version(name))
