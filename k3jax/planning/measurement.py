# SPDX-License-Identifier: Apache-2.0
"""Measures the programs of a batch on the devices of this machine.

The same programs as in `k3jax plan` (k3jax/planning/workload.py), so that a plan can be held
against what a chip does. Weights are not loaded: how long arithmetic takes does not depend on its
numbers, as long as they are not all alike (zeros would cost less power, and so run at higher
clocks).
"""

import statistics
import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp

from k3jax.planning.workload import Name, Work, arguments, lower


def measure(program: Name, work: Work, mesh: jax.sharding.Mesh, repeats: int = 5) -> dict[str, Any]:
    """Compiles a program and runs it; bytes are those of one device.

    Returns:
        The figures of a line of `k3jax benchmark`. `seconds` is the median of the repeats;
        `compile_seconds` counts no tracing, and little where a compilation cache has the program.
        Figures that the backend does not have are None.
    """
    start = time.perf_counter()
    lowered = lower(program, work, mesh)
    traced = time.perf_counter()
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - traced
    inputs = jax.tree.map(_filled, arguments(program, work, mesh))
    jax.block_until_ready(compiled(*inputs))
    seconds = []
    for _ in range(repeats):
        before = time.perf_counter()
        jax.block_until_ready(compiled(*inputs))
        seconds.append(time.perf_counter() - before)
    return {
        "case": program,
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "repeats": repeats,
        "images": work.images,
        "trace_seconds": traced - start,
        "compile_seconds": compile_seconds,
        **_memory(compiled, mesh.devices.flat[0]),
    }


def setting(work: Work, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """What all lines of a run have in common."""
    device = mesh.devices.flat[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": mesh.devices.size,
        "mesh": work.mesh,
        "batch_per_device": work.batch,
        "height": work.height,
        "width": work.width,
        "dtype": work.dtype,
        "param_dtype": work.param_dtype,
        "sampler": work.model.sampler.name,
        "jax": jax.__version__,
        "k3jax": version("k3jax"),
    }


def measure_all(
    names: list[Name], work: Work, mesh: jax.sharding.Mesh, repeats: int = 5
) -> Iterator[dict[str, Any]]:
    """A line for each program, as soon as it is measured; the weights of one at a time."""
    for name in names:
        yield {**measure(name, work, mesh, repeats), **setting(work, mesh)}


def _filled(struct: jax.ShapeDtypeStruct) -> jax.Array:
    return _fill(struct.shape, struct.dtype, struct.sharding)


def _fill(shape, dtype, sharding) -> jax.Array:
    """Small numbers that are not all alike; whole ones are 1: token ids, lengths, true."""

    def make():
        if not jnp.issubdtype(dtype, jnp.floating):
            return jnp.ones(shape, dtype)
        last = jax.lax.broadcasted_iota(jnp.float32, shape, len(shape) - 1) if shape else 1.0
        return (0.02 * jnp.sin(last + 1)).astype(dtype)

    return jax.jit(make, out_shardings=sharding)()


def _memory(compiled: jax.stages.Compiled, device: jax.Device) -> dict[str, int | None]:
    analysis = compiled.memory_analysis()  # JAX makes it None where a backend has none
    in_use = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "argument_bytes": None if analysis is None else analysis.argument_size_in_bytes,
        "temporary_bytes": None if analysis is None else analysis.temp_size_in_bytes,
        "peak_bytes_in_use": in_use,
    }
