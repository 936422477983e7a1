# SPDX-License-Identifier: Apache-2.0
"""Estimates whether a batch fits in device memory, before anything is compiled for it.

Only the compiler knows exactly, after minutes (`k3jax plan` asks it). This is a lower bound that
finds what cannot fit. CPUs have the machine's memory, swap included; devices that do not report
theirs are not checked.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from k3jax.config import ModelConfig
from k3jax.pipelines.call_inputs import CallInputs
from k3jax.pipelines.pipeline import BasePipeline


MAPS = 6.5
"""Feature maps of the U-Net's first level that a step holds at once, at least.

Measured: XLA:TPU's temporaries were 7.0 to 9.1 of them (v5e and v6e; 4, 8 images; 1024x1024;
bfloat16, guided). XLA:CPU's were 25 or more in float32 and 56 or more in bfloat16 (model "tiny"; 1,
4 images; 128 to 512 pixels)."""

MEMINFO = Path("/proc/meminfo")


def check_fits(pipe: BasePipeline, inputs: CallInputs) -> None:
    """`check_memory` for the batches of a call."""
    if pipe.unet is not None:
        run = pipe.config, pipe.mesh, pipe.batch_size, pipe.unet.dtype
        check_memory(*run, inputs.denoised_sizes, inputs.guided)


def check_memory(
    config: ModelConfig,
    mesh: jax.sharding.Mesh,
    batch_size: int,
    dtype,
    sizes: Sequence[tuple[int, int]],
    guided: bool,
) -> None:
    """Refuses a batch size whose denoising step cannot fit in the free memory of the devices.

    Args:
        dtype: of the computation.
        sizes: (width, height) in pixels of the images.
        guided: whether each image runs through the U-Net twice in a step.

    Raises:
        ValueError: with the largest batch size that can fit.
    """
    known = [free for d in mesh.local_devices if (free := free_memory(d)) is not None]
    where, on_cpus = "are free", {d.platform for d in mesh.local_devices} == {"cpu"}
    if not known and on_cpus:
        memory, count = machine_memory(), len(mesh.local_devices)
        known = [] if memory is None else [memory / count]
        where = "is all the memory of the machine" + (f" for each of {count}" if count > 1 else "")
    if not known or not sizes:
        return
    free = min(known)
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    of_image = step_bytes(config, dtype, width, height, guided) / mesh.shape["tensor"]
    most = int(free // of_image) * parts
    if batch_size <= most:
        return
    needed = batch_size // parts * of_image
    advice = f"the largest batch_size that can fit is {most}"
    if most == 0:
        advice = "not even one image fits: choose a smaller size"
        advice += "" if on_cpus else ", or split the U-Net with a mesh"
    raise ValueError(
        f"batch_size {batch_size} of {width}x{height} needs at least {needed / 1e9:.1f} GB on "
        f"each device in addition to the weights, and {free / 1e9:.1f} GB {where}: {advice}."
    )


def step_bytes(config: ModelConfig, dtype, width: int, height: int, guided: bool) -> float:
    """Bytes that a denoising step holds for each image, at least."""
    factor = config.movq.scale_factor
    positions = (width // factor) * (height // factor)
    of_map = positions * config.unet.block_out_channels[0] * np.dtype(dtype).itemsize
    return MAPS * of_map * (2 if guided else 1)


def free_memory(device: jax.Device) -> int | None:
    """Free bytes, or None where the device does not report them."""
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def machine_memory() -> int | None:
    """Bytes of memory and swap of this machine, or None where they are unknown (no Linux).

    Not only the free ones: these may change during a run.
    """
    if not MEMINFO.exists():
        return None
    lines = (line.split() for line in MEMINFO.read_text().splitlines())
    sizes = {words[0]: int(words[1]) * 1024 for words in lines if words[-1] == "kB"}
    return sizes["MemTotal:"] + sizes.get("SwapTotal:", 0)
