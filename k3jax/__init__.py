# SPDX-License-Identifier: Apache-2.0
"""Kandinsky 3, text to image, in JAX on any mesh.

from k3jax import Kandinsky3Pipeline
"""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from k3jax.pipeline import Kandinsky3Pipeline
    from k3jax.sharding import make_mesh
    from k3jax.text_projection import PromptEmbeds

__all__ = ["Kandinsky3Pipeline", "PromptEmbeds", "make_mesh"]

_HOME = {
    "Kandinsky3Pipeline": "k3jax.pipeline",
    "PromptEmbeds": "k3jax.text_projection",
    "make_mesh": "k3jax.sharding",
}


def __getattr__(name: str):
    # Importing JAX takes seconds, which `k3jax --help` must not cost.
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'k3jax' has no attribute {name!r}")
