# SPDX-License-Identifier: Apache-2.0
"""Image files of any kind -> uint8 RGB of a bucket's size."""

import io
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 are turned by a quarter
BACKGROUND = (255, 255, 255)


def read_size(file: BinaryIO, key: str) -> tuple[int, int]:
    """(width, height) as the image is to be seen, from its header only.

    Raises:
        ValueError: the file is no image that Pillow knows; `key` names it.
    """
    try:
        with Image.open(file) as image:
            width, height = image.size
            if image.format == "TIFF":  # Pillow gives the size of some turned ones as upright
                width, height = image.tag_v2[256], image.tag_v2[257]
            # getexif() of a PNG without EXIF data would decode all of it.
            has_exif = image.format != "PNG" or "exif" in image.info
            turned = has_exif and image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    except Exception as error:  # Pillow raises many kinds on broken files
        raise ValueError(_unreadable(key, error)) from error
    return (height, width) if turned else (width, height)


def decode(data: bytes, key: str) -> Image.Image:
    """An RGB image: upright, transparency on white, 16 bits rounded to 8, the first of several.

    Raises:
        ValueError: the file cannot be read; `key` names it.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except Exception as error:
        raise ValueError(_unreadable(key, error)) from error


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


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, in any byte order, or 16 bits widened to 32
        deep = np.asarray(image).astype(np.float64)
        return Image.fromarray(np.rint(deep.clip(0, 65535) / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of an unknown range")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _unreadable(key: str, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        error = "it is of no known format"
    return f"image {key} cannot be read ({error}): replace it or take it out."
