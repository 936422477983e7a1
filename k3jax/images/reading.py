# SPDX-License-Identifier: Apache-2.0
"""Images and masks that people give, in whatever form, as arrays of one form.

Taken are paths, PIL images of any mode, and numpy arrays (h, w), (h, w, 1), (h, w, 3), (h, w, 4) of
uint8, uint16, bool or floats in [0, 1]; of images and masks also lists of these, and arrays with a
batch in front. What a camera noted of its orientation is applied, transparency lies over white, and
of 16 bits 8 are kept.
"""

import os
from typing import Any

import numpy as np
from PIL import Image

from k3jax.images.decoding import decoding, load_image, upright
from k3jax.images.mask_colors import is_grey, shades


WHITE = (255, 255, 255, 255)
NOISE = 1 / 16
"""Share of the range that a mask of whole numbers may be off black or white and still count as it:
the compression of a JPEG must not make everything a little bit to be repainted."""


def read_image(image: Any, name: str = "image") -> np.ndarray:
    """One image as uint8 (h, w, 3).

    Raises:
        ValueError: one sentence on what it is instead.
    """
    opened, name = _opened(image, name)
    if isinstance(opened, Image.Image):
        return _from_pil(opened, name)
    return _from_array(_array(opened, name), name)


def read_images(images: Any, name: str = "image") -> list[np.ndarray]:
    """One image or several as a list of uint8 (h, w, 3) that is not empty."""
    return [read_image(one, where) for one, where in _each(images, name, (3, 4))]


def read_mask(mask: Any, name: str = "mask_image") -> np.ndarray:
    """One mask as float32 (h, w): 1 (white) is repainted, 0 (black) kept.

    Booleans, 0/1 and 0/255 (or 0/65535) mean the same; fractions are kept. One colour on black
    counts as white on black, whatever colour it is and whether or not it has a palette.

    Raises:
        ValueError: one sentence on what it is instead.
    """
    opened, name = _opened(mask, name)
    if isinstance(opened, Image.Image):
        opened = _mask_from_pil(opened, name)
    array = _array(opened, name)
    if array.ndim == 3 and array.shape[2] in (1, 3) and (array == array[:, :, :1]).all():
        array = array[:, :, 0]
    elif array.ndim == 3 and array.shape[2] in (3, 4):
        array = _without_color(array, name)
    if array.ndim != 2:
        raise ValueError(f"{name} has shape {array.shape}; a mask is (height, width).")
    return _shares(array, name)


def read_masks(masks: Any, name: str = "mask_image") -> list[np.ndarray]:
    """One mask or several as a list of float32 (h, w) that is not empty."""
    return [read_mask(one, where) for one, where in _each(masks, name, (2, 3))]


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


def resize_mask(mask: np.ndarray, width: int, height: int) -> np.ndarray:
    """A mask in another size, as the original's skimage.transform.resize of numbers does it."""
    if mask.shape == (height, width):
        return mask
    from scipy import ndimage

    zoom = (height / mask.shape[0], width / mask.shape[1])
    resized = ndimage.zoom(mask.astype(np.float64), zoom, order=1, mode="mirror", grid_mode=True)
    return np.clip(resized, mask.min(), mask.max()).astype(np.float32)


def _each(images: Any, name: str, ndims: tuple[int, int]):
    """(one, its name) of a list, of an array with a batch in front, or of one alone."""
    several = ndims[1]
    if hasattr(images, "__array__") and not isinstance(images, Image.Image):
        images = np.asarray(images)
        # (h, w, 1), (h, w, 3) and (h, w, 4) are one mask, (b, h, w) are several.
        batch = images.ndim == several and not (several == 3 and images.shape[2] in (1, 3, 4))
        if not batch and not (several == 3 and images.ndim == 4):
            return [(images, name)]
    elif not isinstance(images, list | tuple):
        return [(images, name)]
    if not len(images):
        raise ValueError(f"{name} is an empty list: give at least one.")
    return [(image, f"{name} {number}") for number, image in enumerate(images)]


def _opened(image: Any, name: str) -> tuple[Any, str]:
    """What is at a path, and a name with the path in it; PIL images upright and decoded."""
    if isinstance(image, Image.Image):
        return upright(image, name), name
    if not isinstance(image, str | os.PathLike):
        return image, name
    path = os.path.expanduser(image)
    if not os.path.isfile(path):
        raise ValueError(f"{name}: there is no file {image}.")
    name = f"{name}: {image}"
    try:
        with open(path, "rb") as file:
            return load_image(file, name), name
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}.") from None


def _array(image: Any, name: str) -> np.ndarray:
    if image is None or not hasattr(image, "__array__"):
        raise ValueError(
            f"{name} must be a path, a PIL image or an array, not {type(image).__name__}."
        )
    array = np.asarray(image)
    if array.dtype.kind not in "buif" or 0 in array.shape:
        raise ValueError(f"{name} is an array {array.shape} of {array.dtype}, which is no image.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name} has values that are not finite.")
    return array


def _from_pil(image: Image.Image, name: str) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":
        return _from_array(_array(_numbers(image), name), name)
    with decoding(name):
        if image.has_transparency_data:
            return _over_white(np.asarray(_rgba(image)))
        return np.asarray(image.convert("RGB"))


def _rgba(image: Image.Image) -> Image.Image:
    # Pillow converts a grey image that is multiplied by its transparency only to one that is not.
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def _numbers(image: Image.Image) -> np.ndarray:
    """The pixels of a mode with more than 8 bits: whole numbers, or floats in [0, 1]."""
    array = np.asarray(image)
    if image.mode == "F":
        return array / 255 if array.max() > 1 else array
    if image.mode != "I":
        return array.astype(np.uint16)
    # It has 32 bits, but the files that it is read from have 16.
    return array.astype(np.uint16) if 255 < array.max() < 2**16 and array.min() >= 0 else array


def _from_array(array: np.ndarray, name: str) -> np.ndarray:
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ValueError(f"{name} has shape {array.shape}; an image is (height, width, channels).")
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


def _mask_from_pil(mask: Image.Image, name: str) -> np.ndarray:
    """Numbers (h, w) in any range."""
    if mask.mode.startswith("I") or mask.mode == "F":
        return _numbers(mask)
    with decoding(name):
        if mask.has_transparency_data:
            mask = _rgba(mask)
        elif mask.mode not in ("1", "L"):
            mask = mask.convert("RGB")
    array = np.asarray(mask)
    return array if array.ndim == 2 else _without_color(array, name)


def _without_color(mask: np.ndarray, name: str) -> np.ndarray:
    """A mask (h, w, 3) or (h, w, 4) as uint8 (h, w); a colour on black counts as white."""
    if mask.shape[2] == 4 and _from_array(mask[..., 3:], name).min() < 255:
        raise ValueError(
            f"{name} is transparent in places, which can mean both: give a mask in black "
            "(kept) and white (repainted)."
        )
    rgb = _from_array(mask[..., :3], name)
    if is_grey(rgb):
        return np.asarray(Image.fromarray(rgb).convert("L"))
    return shades(rgb, name)


def _shares(array: np.ndarray, name: str) -> np.ndarray:
    """Values in [0, 1] from whatever range they are in."""
    if array.dtype == bool:
        return array.astype(np.float32)
    low, high = array.min(), array.max()
    slack = 1e-3 if array.dtype.kind == "f" else 0  # what resizing may overshoot
    if low < -slack or high > 65535:
        raise ValueError(
            f"{name} has values from {low:g} to {high:g}; a mask is 0 (kept) to 1 or 255."
        )
    if high <= 1 + slack:
        return np.clip(array, 0, 1).astype(np.float32)
    shares = np.clip(array, 0, None) / (255 if high <= 255 else 65535)
    shares = np.where(shares < NOISE, 0, np.where(shares > 1 - NOISE, 1, shares))
    return shares.astype(np.float32)
