# SPDX-License-Identifier: Apache-2.0
"""The images that samples start from, and the pipelines that they are for.

An image with a mask is inpainted, one without is changed by image to image; a sample with neither
is text to image.
"""

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from k3jax.images.decoding import load_image
from k3jax.images.masks import read_mask, resize_mask
from k3jax.images.reading import read_image, resize_image
from k3jax.pipelines.image_to_image import Kandinsky3Img2ImgPipeline
from k3jax.pipelines.inpaint import Kandinsky3InpaintPipeline
from k3jax.pipelines.pipeline import BasePipeline
from k3jax.pipelines.text_to_image import Kandinsky3Pipeline
from k3jax.synthesis.samples import Operation, Sample
from k3jax.synthesis.store import is_remote, open_file


@dataclass(frozen=True)
class InputImages:
    """What a sample starts from.

    Attributes:
        image: uint8 (h, w, 3), scaled and cropped about its middle to the sample's size.
        mask: float32 (h, w), treated alike; None without one.
        sha256: of the files, by "image_sha256" and "mask_sha256".
    """

    image: np.ndarray
    mask: np.ndarray | None
    sha256: Mapping[str, str]


def pipeline_class(in_channels: int, latent_channels: int) -> type[BasePipeline]:
    """What a checkpoint is loaded as: an inpainting U-Net can do nothing else."""
    return Kandinsky3Pipeline if in_channels == latent_channels else Kandinsky3InpaintPipeline


def read_inputs(sample: Sample, base: str) -> InputImages | str:
    """The images of a sample, or why they cannot be used.

    Args:
        base: the folder or address that relative paths start from.
    """
    try:
        image, image_hash = _read(sample.image, base, sample.image_sha256, "image")
        array = read_image(image, f"the image {sample.image}")
        hashes = {"image_sha256": image_hash}
        if sample.mask is None:
            return InputImages(_fitted(array, sample), None, hashes)
        image, hashes["mask_sha256"] = _read(sample.mask, base, sample.mask_sha256, "mask")
        mask = read_mask(image, f"the mask {sample.mask}")
        if mask.shape != array.shape[:2]:
            sizes = ["x".join(map(str, a.shape[1::-1])) for a in (mask, array)]
            raise ValueError(f"the mask is {sizes[0]} and the image {sizes[1]}")
        return InputImages(_fitted(array, sample), _fitted(mask, sample), hashes)
    except ValueError as error:
        return str(error).rstrip(".")


def images_from_inputs(
    pipe: BasePipeline,
    operation: Operation,
    samples: Sequence[Sample],
    inputs: Sequence[InputImages],
    arguments: Mapping[str, Any],
) -> Sequence[np.ndarray]:
    """Images of samples that start from images, by the pipeline of their task.

    Args:
        pipe: any pipeline; its modules are used.
        arguments: those that all tasks share, sizes left out.
    """
    size = samples[0].width * samples[0].height
    more = {
        "image": [source.image for source in inputs],
        "strength": [sample.strength for sample in samples],
        "max_area": size,  # images have the size that they are worked at
    }
    if operation == "image":
        return Kandinsky3Img2ImgPipeline.from_pipe(pipe)(**more, **arguments).images
    masks = [source.mask for source in inputs]
    return Kandinsky3InpaintPipeline.from_pipe(pipe)(mask_image=masks, **more, **arguments).images


def _read(path: str, base: str, sha256: str | None, name: str) -> tuple[Image.Image, str]:
    """(upright image, sha256 of its file)."""
    if not is_remote(path) and not os.path.isabs(path):
        path = f"{base.rstrip('/')}/{path}"
    try:
        with open_file(path) as file:
            content = file.read()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    found = hashlib.sha256(content).hexdigest()
    if sha256 not in (None, found):
        raise ValueError(f"the {name} {path} is not the one that was used (its sha256 differs)")
    return load_image(io.BytesIO(content), f"the {name} {path}"), found


def _fitted(array: np.ndarray, sample: Sample) -> np.ndarray:
    """Scaled and cropped about the middle to the size of a sample."""
    height, width = array.shape[:2]
    share = max(sample.width / width, sample.height / height)
    keep_w = min(width, max(1, round(sample.width / share)))
    keep_h = min(height, max(1, round(sample.height / share)))
    left, top = (width - keep_w) // 2, (height - keep_h) // 2
    part = array[top : top + keep_h, left : left + keep_w]
    if array.ndim == 2:
        return resize_mask(part, sample.width, sample.height)
    part = np.ascontiguousarray(part)
    return resize_image(part, sample.width, sample.height, Image.Resampling.BICUBIC)
