# SPDX-License-Identifier: Apache-2.0
"""Images that people give, in whatever form, as arrays of one form: uint8 (h, w, 3).

Accepted are paths, bytes and open files of images, PIL images of any mode, and arrays or tensors
(h, w), (h, w, 1), (h, w, 3), (h, w, 4) of uint8, uint16, bool or floats in [0, 1]; channels may
also come first, as in PyTorch. Of images and masks also lists of these, and arrays with a batch in
front. The orientation that a camera noted is applied, transparent images are put on white, and of
16 bits 8 are kept.
"""

import io
import os
from typing import Any

import numpy as np
from PIL import Image

from k3jax.arguments import shown, to_host
from k3jax.images.decoding import decoding, load_image, upright


WHITE = (255, 255, 255, 255)
CHANNELS = (1, 3, 4)


def read_image(image: Any, name: str = "image") -> np.ndarray:
    """One image as uint8 (h, w, 3).

    Raises:
        ValueError: one sentence on what it is instead.
    """
    opened, name = opened_image(image, name)
    return (
        _from_pil(opened, name) if isinstance(opened, Image.Image) else to_uint8_rgb(opened, name)
    )


def read_images(images: Any, name: str = "image") -> list[np.ndarray]:
    """One image or several as a list of uint8 (h, w, 3) that is not empty."""
    return [read_image(one, where) for one, where in one_by_one(images, name, (3, 4))]


def resize_image(image: np.ndarray, width: int, height: int, resample) -> np.ndarray:
    """An image (h, w, 3), uint8 or float32 in [0, 1], in another size; itself if it has it."""
    if image.shape[:2] == (height, width):
        return image
    if image.dtype == np.uint8:
        return np.asarray(Image.fromarray(image).resize((width, height), resample))
    channels = [
        Image.fromarray(c).resize((width, height), resample) for c in np.moveaxis(image, -1, 0)
    ]
    return np.clip(np.stack(channels, axis=-1), 0, 1)


def one_by_one(images: Any, name: str, ndims: tuple[int, int]) -> list[tuple[Any, str]]:
    """(one, its name) of a list, of an array with a batch in front, or of one alone.

    Args:
        ndims: dimensions of one, and of a batch.
    """
    several = ndims[1]
    images = images if isinstance(images, Image.Image) else to_host(images)
    if isinstance(images, np.ndarray):
        # (h, w, 1), (h, w, 3) and (h, w, 4) are one mask, (b, h, w) are several.
        batch = images.ndim == several and not (several == 3 and images.shape[2] in CHANNELS)
        if not batch and not (several == 3 and images.ndim == 4):
            return [(images, name)]
    elif not isinstance(images, list | tuple):
        return [(images, name)]
    if not len(images):
        raise ValueError(f"{name} is an empty list: give at least one.")
    return [(image, f"{name} {number}") for number, image in enumerate(images)]


def opened_image(image: Any, name: str) -> tuple[Image.Image | np.ndarray, str]:
    """A PIL image, upright and decoded, or an array with channels last; and a name with the path.

    Raises:
        ValueError: one sentence on what it is instead.
    """
    if isinstance(image, Image.Image):
        return upright(image, name), name
    if isinstance(image, bytes | bytearray | memoryview):
        return load_image(io.BytesIO(image), name), name
    if isinstance(image, str | os.PathLike):
        return _opened_path(image, name)
    if callable(getattr(image, "read", None)):
        return load_image(io.BytesIO(_content(image, name)), name), name
    return pixel_array(image, name), name


def _opened_path(path: Any, name: str) -> tuple[Image.Image, str]:
    if isinstance(path, str) and path.startswith(("http://", "https://", "data:")):
        raise ValueError(
            f"{name} is an address ({shown(path)}): download it, and give the path or the bytes."
        )
    try:
        file = os.path.expanduser(path)
        found = os.path.isfile(file)
    except (ValueError, TypeError):  # a NUL in it
        found = False
    if not found:
        raise ValueError(f"{name}: there is no file {_printable(path)}.")
    name = f"{name}: {_printable(path)}"
    try:
        with open(file, "rb") as opened:
            return load_image(opened, name), name
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}.") from None


def _printable(path: Any) -> str:
    text = os.fsdecode(path)
    return text if text.isprintable() and len(text) < 1000 else shown(text)


def _content(file: Any, name: str) -> bytes:
    """What an open file holds, from its start where it can go there."""
    try:
        if file.seekable():
            file.seek(0)
        content = file.read()
    except Exception as error:
        raise ValueError(f"{name} is a file that cannot be read ({error}).") from None
    if not isinstance(content, bytes):
        raise ValueError(f'{name} is a file of text: open it with open(path, "rb").')
    return content


def pixel_array(image: Any, name: str) -> np.ndarray:
    """A tensor or array with channels last, checked to hold finite numbers."""
    try:
        array = to_host(image)
    except Exception:
        array = None
    if not isinstance(array, np.ndarray):
        raise ValueError(
            f"{name} must be a path, bytes, a PIL image or an array, not {type(image).__name__}."
        )
    if array.dtype.kind not in "buif" or 0 in array.shape:
        raise ValueError(f"{name} is an array {array.shape} of {array.dtype}, which is no image.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name} has values that are not finite.")
    if array.ndim == 3 and array.shape[2] not in CHANNELS and array.shape[0] in CHANNELS:
        array = np.moveaxis(array, 0, -1)  # PyTorch's order
    return array


def _from_pil(image: Image.Image, name: str) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":
        return to_uint8_rgb(pixel_array(numbers_of(image), name), name)
    with decoding(name):
        if image.has_transparency_data:
            return _over_white(np.asarray(to_rgba(image)))
        return np.asarray(image.convert("RGB"))


def to_rgba(image: Image.Image) -> Image.Image:
    # Pillow converts a grey image that is multiplied by its transparency only to one that is not.
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def numbers_of(image: Image.Image) -> np.ndarray:
    """The pixels of a mode with more than 8 bits: whole numbers, or floats in [0, 1]."""
    array = np.asarray(image)
    if image.mode == "F":
        return array / 255 if array.max() > 1 else array
    if image.mode != "I":
        return array.astype(np.uint16)
    # It has 32 bits, but the files that it is read from have 16.
    return array.astype(np.uint16) if 255 < array.max() < 2**16 and array.min() >= 0 else array


def to_uint8_rgb(array: np.ndarray, name: str) -> np.ndarray:
    """Pixels (h, w), (h, w, 1), (h, w, 3) or (h, w, 4) as uint8 (h, w, 3)."""
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[2] not in CHANNELS:
        raise ValueError(
            f"{name} has shape {array.shape}; an image is (height, width, channels), with 1, 3 or "
            "4 channels."
        )
    low, high = array.min(), array.max()
    if array.dtype.kind == "f":
        if low < 0 or high > 1:
            raise ValueError(f"{name} has floats from {low:g} to {high:g}; they must be in 0 to 1.")
        array = np.rint(array * 255)
    elif array.dtype == bool:
        array = array * np.uint8(255)
    elif array.dtype == np.uint16:
        array = np.rint(array / 257)
    elif low < 0 or high > 255:
        raise ValueError(f"{name} has values from {low} to {high}; they must be in 0 to 255.")
    array = array.astype(np.uint8)
    if array.shape[2] == 4:
        return _over_white(array)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def _over_white(rgba: np.ndarray) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(rgba))
    white = Image.new("RGBA", image.size, WHITE)
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"))
