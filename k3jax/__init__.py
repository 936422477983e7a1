# SPDX-License-Identifier: Apache-2.0
"""Kandinsky 3 in JAX on any mesh.

from k3jax import Kandinsky3Pipeline
"""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from k3jax.images.compositing import extend_canvas
    from k3jax.model.context import PromptEmbeds
    from k3jax.pipelines.image_to_image import Kandinsky3Img2ImgPipeline
    from k3jax.pipelines.inpaint import Kandinsky3InpaintPipeline
    from k3jax.pipelines.original import (
        get_inpainting_pipeline,
        get_T2I_Flash_pipeline,
        get_T2I_pipeline,
    )
    from k3jax.pipelines.prompts import mix_prompts
    from k3jax.pipelines.text_to_image import Kandinsky3Pipeline
    from k3jax.sharding import make_mesh

_HOME = {
    "Kandinsky3Img2ImgPipeline": "k3jax.pipelines.image_to_image",
    "Kandinsky3InpaintPipeline": "k3jax.pipelines.inpaint",
    "Kandinsky3Pipeline": "k3jax.pipelines.text_to_image",
    "PromptEmbeds": "k3jax.model.context",
    "extend_canvas": "k3jax.images.compositing",
    "get_T2I_Flash_pipeline": "k3jax.pipelines.original",
    "get_T2I_pipeline": "k3jax.pipelines.original",
    "get_inpainting_pipeline": "k3jax.pipelines.original",
    "make_mesh": "k3jax.sharding",
    "mix_prompts": "k3jax.pipelines.prompts",
}

__all__ = [
    "Kandinsky3Img2ImgPipeline",
    "Kandinsky3InpaintPipeline",
    "Kandinsky3Pipeline",
    "PromptEmbeds",
    "extend_canvas",
    "get_T2I_Flash_pipeline",
    "get_T2I_pipeline",
    "get_inpainting_pipeline",
    "make_mesh",
    "mix_prompts",
]


def __getattr__(name: str):
    # Importing JAX takes seconds, which `k3jax --help` must not cost.
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'k3jax' has no attribute {name!r}")
