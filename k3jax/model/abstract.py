# SPDX-License-Identifier: Apache-2.0
"""The components of a model as modules without weights.

Weights are always loaded into an abstract module (every leaf a ShapeDtypeStruct); nothing is ever
initialised at full size.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from k3jax.config import AttentionForm, ModelConfig
from k3jax.model.attention import set_attention_form
from k3jax.model.context import TextProjection
from k3jax.model.movq import MoVQ
from k3jax.model.text_encoder import TextEncoder
from k3jax.model.unet import UNet


COMPONENT_CLASSES = {
    "text_encoder": TextEncoder,
    "text_projection": TextProjection,
    "unet": UNet,
    "movq": MoVQ,
}
"""Component name -> module class, in the order of `k3jax.config.COMPONENTS`."""


class _ShapeRngs:
    """Stands in for nnx.Rngs where only shapes matter.

    nnx.Rngs counts its calls in a Variable, and under eval_shape each write walks the jaxpr so far:
    42 s for the full U-Net against 2 s with a constant key.
    """

    def __init__(self):
        self._key = jax.random.key(0)

    def params(self):
        return self._key


def abstract_module(
    component: str,
    config: ModelConfig,
    param_dtype="float32",
    dtype=None,
    attention: AttentionForm = "auto",
) -> nnx.Module:
    """A component whose leaves are ShapeDtypeStructs.

    Args:
        component: one of COMPONENT_CLASSES.
        param_dtype: dtype of the weights.
        dtype: dtype of the computation; that of the weights by default.
        attention: see `k3jax.model.attention`.
    """
    param_dtype = jnp.dtype(param_dtype)
    dtype = param_dtype if dtype is None else jnp.dtype(dtype)
    module = nnx.clone(_abstract_module(component, getattr(config, component), param_dtype, dtype))
    set_attention_form(module, attention)
    return module


@functools.lru_cache(maxsize=32)
def _abstract_module(component: str, config, param_dtype, dtype) -> nnx.Module:
    """To be cloned: that takes a tenth of the time in which the U-Net is traced."""
    # Where a mesh is set, Flax takes the layers' names of dimensions for axes of it.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return nnx.eval_shape(
            lambda: COMPONENT_CLASSES[component](
                config, dtype=dtype, param_dtype=param_dtype, rngs=_ShapeRngs()
            )
        )


def parameter_count(module: nnx.Module) -> int:
    """Number of weights of a module, abstract or real."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module)))
