# SPDX-License-Identifier: Apache-2.0
"""On CPUs alone, LLVM optimises less: a picture takes longer to compile than to make."""

import os
from importlib.metadata import entry_points
from importlib.util import find_spec


FLAG = "--xla_backend_optimization_level"
ACCELERATORS = ("libtpu", "jax_plugins")  # the packages that bring JAX any device but CPUs


def compile_quickly_on_cpus() -> None:
    """Sets LLVM's -O1 in XLA_FLAGS, where no level is set; call it before JAX looks for devices.

    The small model's programs take three quarters of the CPU time to compile and as long to run as
    with -O3: their convolutions and matrix products are library code.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if FLAG not in flags and _only_cpus():
        os.environ["XLA_FLAGS"] = f"{flags} {FLAG}=1".strip()


def _only_cpus() -> bool:
    """Whether JAX cannot find other devices, told without loading it. GPUs obey the flag, too."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not any(map(find_spec, ACCELERATORS)) and not entry_points(group="jax_plugins")
