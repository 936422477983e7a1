# SPDX-License-Identifier: Apache-2.0
"""Previews of images between steps: a linear map from latents to colours.

One latent becomes one pixel, so a preview has an eighth of the image's sides and costs nothing. The
map is fitted once to MoVQ's encoding of random colours, and kept in the user's cache.
"""

import contextlib
import json
import os
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from k3jax.files import user_cache
from k3jax.model.movq import MoVQ, normalize


FIT_IMAGES, FIT_SIZE = 16, 128


@dataclass(frozen=True)
class StepPreview:
    """A batch between two steps.

    Attributes:
        step: how many of `num_steps` are done.
        timestep: the U-Net's last input, 0 to 999.
        index: which images of the call these are.
        latents: the image latents that the last step predicted, float32 (b, h/8, w/8, 4).
        map: (5, 3), from `fit_preview`.
    """

    step: int
    num_steps: int
    timestep: float
    index: np.ndarray
    latents: np.ndarray
    map: np.ndarray

    def images(self, enlarge: int = 1) -> list[Image.Image]:
        """The previews, `enlarge` pixels per latent along each side."""
        pixels = latents_to_rgb(self.latents, self.map)
        height, width = pixels.shape[1:3]
        size = (width * enlarge, height * enlarge)
        return [Image.fromarray(p).resize(size, Image.Resampling.BILINEAR) for p in pixels]


def latents_to_rgb(latents: np.ndarray, map: np.ndarray) -> np.ndarray:
    """Latents (b, h, w, 4) as uint8 (b, h, w, 3) by a map (5, 3)."""
    colors = latents @ map[:-1] + map[-1]
    return np.rint(np.clip(colors, 0, 1) * 255).astype(np.uint8)


def fit_preview(movq: MoVQ, images: np.ndarray | None = None) -> np.ndarray:
    """The linear map that comes nearest to the decoder, by least squares.

    Args:
        images: uint8 (b, h, w, 3) to fit it to; random flat colours by default.

    Returns:
        float32 (5, 3): four rows for the latents' channels, one to be added; colours in [0, 1].
    """
    images = flat_images(FIT_IMAGES, FIT_SIZE) if images is None else images
    latents, colors = (np.asarray(x) for x in _pairs(movq, jnp.asarray(images)))
    flat = latents.reshape(-1, latents.shape[-1])
    flat = np.concatenate([flat, np.ones((len(flat), 1), np.float32)], axis=1)
    fitted, *_ = np.linalg.lstsq(flat, colors.reshape(-1, 3), rcond=None)
    return fitted.astype(np.float32)


def preview_map(movq: MoVQ, digest: str | None) -> np.ndarray:
    """The map of a decoder: fitted at first use on a machine, then read from the user's cache.

    Args:
        digest: of its weights; None: the cache is not used.
    """
    map = None if digest is None else _stored(digest)
    if map is None:
        map = fit_preview(movq)
        if digest is not None:
            _store(digest, map)
    return map


def flat_images(count: int, size: int) -> np.ndarray:
    """Images of four flat colours, uint8 (count, size, size, 3); always the same ones.

    Large flat parts are what an autoencoder gives back best, so that the fit is not to its errors.
    """
    colors = np.random.default_rng(0).uniform(-0.3, 1.3, (count, 2, 2, 3)).clip(0, 1)
    large = colors.repeat(size // 2, axis=1).repeat(size // 2, axis=2)
    return np.rint(255 * large).astype(np.uint8)


@jax.jit
def _pairs(movq: MoVQ, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Latents of images, and the mean colour that the decoder gives the pixels of each."""

    def one(image):
        latents = movq.encode(normalize(image[None]))
        decoded = jnp.clip(movq.decode(latents) * 0.5 + 0.5, 0, 1)
        _, h, w, _ = latents.shape
        means = decoded.reshape(h, decoded.shape[1] // h, w, decoded.shape[2] // w, 3).mean((1, 3))
        return latents[0], means

    return jax.lax.map(one, images)


def _stored(digest: str) -> np.ndarray | None:
    with contextlib.suppress(OSError, ValueError):
        map = np.array(json.loads(_file(digest).read_text()), np.float32)
        return map if map.shape[1:] == (3,) else None
    return None


def _store(digest: str, map: np.ndarray) -> None:
    """Only a cache: a folder that cannot be written does not matter."""
    with contextlib.suppress(OSError):
        file = _file(digest)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(map.tolist()))
        os.replace(part, file)


def _file(digest: str):
    return user_cache() / "previews" / f"{digest.rpartition(':')[2]}.json"
