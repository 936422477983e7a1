# SPDX-License-Identifier: Apache-2.0
"""Optional packages, and the extra of k3jax that each comes with."""

import importlib.util


EXTRAS = {
    "convert": ("torch", "safetensors", "huggingface_hub"),
    "synth": ("pyarrow", "fsspec", "prometheus_client"),
    "train": ("optax", "grain", "pyarrow"),
    "gcs": ("gcsfs",),
    "tpu": ("libtpu",),
}
"""Extra -> the packages of it that its commands cannot do without."""


def require(extra: str) -> None:
    """Looks for an extra's packages, before work that would need them only at its end.

    Raises:
        ImportError: naming what is missing and how to get it.
    """
    for package in EXTRAS[extra]:
        if importlib.util.find_spec(package) is None:
            raise ImportError(missing(package, extra))


def missing(package: str, extra: str | None = None) -> str:
    """One sentence on a package that is not there."""
    extra = extra or next((name for name, packages in EXTRAS.items() if package in packages), None)
    install = package if extra is None else f"'k3jax[{extra}]'"
    return f"this needs {package}, which is not installed: pip install {install}."
