# SPDX-License-Identifier: Apache-2.0
"""Image files of any kind -> uint8 RGB of a bucket's size."""

import io
from typing import BinaryIO

import numpy as np
from PIL import Image

from k3jax.images import decoding as image_files
from k3jax.images.reading import read_image


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
    return Image.fromarray(read_image(image, name))


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
