# SPDX-License-Identifier: Apache-2.0
"""Kandinsky 3.1 inpainting: the U-Net also sees a mask and the latents of the masked image.

    k3jax convert ai-forever/Kandinsky3.1 weights/inpainting --config inpainting \\
        --text-encoder-from weights/kandinsky3
    k3jax info --config inpainting
"""

from k3jax.configs.models.kandinsky3 import get_config as kandinsky3


def get_config():
    config = kandinsky3()
    config.checkpoint = "weights/inpainting"
    config.convert.variant = "inpainting"

    config.model.unet.in_channels = 9  # latents 4, mask 1 (1 where the image is kept), latents 4

    config.model.sampler.guidance_scale = 4.0
    config.model.sampler.threshold_percentile = 0.95
    return config
