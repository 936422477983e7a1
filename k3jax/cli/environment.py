# SPDX-License-Identifier: Apache-2.0
"""What is installed on this machine: optional packages, and plugins of accelerators."""

import os
from importlib.metadata import entry_points
from importlib.util import find_spec


EXTRAS = {
    "convert": ("torch", "safetensors", "huggingface_hub"),
    "synth": ("pyarrow", "fsspec", "prometheus_client"),
    "train": ("optax", "grain", "pyarrow"),
    "gcs": ("gcsfs",),
    "tpu": ("libtpu",),
}
"""Extra of k3jax -> the packages of it that its commands need."""
OPTIONAL = {package for packages in EXTRAS.values() for package in packages} | {"datasets"}

FLAG = "--xla_backend_optimization_level"
ACCELERATORS = ("libtpu", "jax_plugins")  # packages that give JAX devices other than CPUs


def require(extra: str) -> None:
    """Looks for an extra's packages, before work that needs them only at its end.

    Raises:
        ImportError: a package is not installed; the message has the command that installs it.
    """
    for package in EXTRAS[extra]:
        if find_spec(package) is None:
            raise ImportError(missing(package, extra))


def missing(package: str, extra: str | None = None) -> str:
    """One sentence on a package that is not installed."""
    extra = extra or next((name for name, packages in EXTRAS.items() if package in packages), None)
    install = package if extra is None else f"'k3jax[{extra}]'"
    return f"this needs {package}, which is not installed: pip install {install}."


def compile_quickly_on_cpus() -> None:
    """Sets LLVM's -O1 in XLA_FLAGS if no level is set; call it before JAX looks for devices.

    On CPUs an image takes longer to compile than to compute. With -O1 the small model compiles in
    three quarters of the CPU time and runs as fast as with -O3: its convolutions and matrix
    products are library code.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if FLAG not in flags and _only_cpus():
        os.environ["XLA_FLAGS"] = f"{flags} {FLAG}=1".strip()


def _only_cpus() -> bool:
    """Whether JAX cannot find other devices, without importing JAX. GPUs obey the flag, too."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not any(map(find_spec, ACCELERATORS)) and not entry_points(group="jax_plugins")
