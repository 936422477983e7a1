# SPDX-License-Identifier: Apache-2.0
"""The extra inputs of an inpainting U-Net: the mask, and latents of the masked image.

Its 9 channels are noisy latents (4), mask (1), latents of the masked image (4), in this order.
Masks are 1 where the image is known and 0 where it is to be painted. The pixels to be painted
become 0 (mid-grey) before MoVQ sees the image, and the mask is brought to the latents' size by
nearest downsampling. Source: ai-forever/Kandinsky-3, inpainting_pipeline.py, utils.py.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from k3jax.model.movq import normalize


Encode = Callable[[jax.Array], jax.Array]
"""`MoVQ.encode`: images in [-1, 1], (b, h, w, 3) -> latents float32 (b, h/8, w/8, 4)."""


def inpainting_inputs(
    images: jax.Array, masks: jax.Array, encode: Encode
) -> tuple[jax.Array, jax.Array]:
    """The extra channels for images and masks; may be compiled.

    Args:
        images: uint8, or float in [-1, 1], (b, h, w, 3).
        masks: (b, h, w) in pixels, 1 known, 0 to be painted; fractions count as to be painted in
            the image and are kept in the mask channel, as in the original.

    Returns:
        (mask float32 (b, h/8, w/8, 1), masked latents float32 (b, h/8, w/8, 4)).
    """
    if images.dtype == jnp.uint8:
        images = normalize(images)
    masks = jnp.asarray(masks, jnp.float32)[..., None]
    latents = encode(jnp.where(masks < 1, 0.0, images))
    factor = images.shape[1] // latents.shape[1]
    return masks[:, ::factor, ::factor], latents
