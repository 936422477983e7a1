# SPDX-License-Identifier: Apache-2.0
"""Kandinsky 3 in JAX on any mesh.

from k3jax import Kandinsky3Pipeline
"""

from etils import epy


with epy.lazy_api_imports(globals()):  # JAX takes seconds to import, which `k3jax --help` avoids
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
