# SPDX-License-Identifier: Apache-2.0
"""Whether a batch has room on the devices, told before anything is compiled for it.

The compiler knows exactly and takes minutes to say so (`k3jax plan` asks it); here arithmetic finds
what cannot fit. Devices that do not tell their memory, as CPUs, are not asked.
"""

from collections.abc import Sequence

import jax
import numpy as np

from k3jax.base_pipeline import BasePipeline


MAPS = 6.5
"""Maps of the U-Net's first level that a step holds at once, at the least: XLA:TPU's temporaries
were 7.0 to 9.1 of them (v5e and v6e; 4, 8 images; 1024x1024; bfloat16, guided)."""


def check_room(pipe: BasePipeline, sizes: Sequence[tuple[int, int]], guided: bool) -> None:
    """Refuses a batch size whose denoising step cannot fit beside what lies on the devices now.

    Args:
        sizes: (width, height) in pixels of the images that will be made.
        guided: whether each image runs through the U-Net twice in a step.

    Raises:
        ValueError: with the largest batch size that can fit.
    """
    told = [free for d in pipe.mesh.local_devices if (free := free_memory(d)) is not None]
    if not told or pipe.unet is None or not sizes:
        return
    free = min(told)
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    shape = pipe.mesh.shape
    parts = shape["data"] * shape["fsdp"]
    of_image = step_bytes(pipe, width, height, guided) / shape["tensor"]
    most = int(free // of_image) * parts
    if pipe.batch_size <= most:
        return
    needed = pipe.batch_size // parts * of_image
    advice = f"the largest batch_size that can fit is {most}"
    if most == 0:
        advice = "not even one image fits: make smaller ones, or split the U-Net with a mesh"
    raise ValueError(
        f"batch_size {pipe.batch_size} of {width}x{height} needs at least {needed / 1e9:.1f} GB on "
        f"each device besides the weights, and {free / 1e9:.1f} GB are free: {advice}."
    )


def step_bytes(pipe: BasePipeline, width: int, height: int, guided: bool) -> float:
    """The least that a denoising step holds for each image."""
    config, factor = pipe.config.unet, pipe.config.movq.scale_factor
    positions = (width // factor) * (height // factor)
    of_map = positions * config.block_out_channels[0] * np.dtype(pipe.unet.dtype).itemsize
    return MAPS * of_map * (2 if guided else 1)


def free_memory(device: jax.Device) -> int | None:
    """Bytes that nothing lies in, or None where the device does not tell."""
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
