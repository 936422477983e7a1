# SPDX-License-Identifier: Apache-2.0
"""Random first weights, drawn in numpy leaf by leaf.

The distributions are those of the PyTorch implementations, with three differences that make small
models learn faster: the U-Net's last convolution starts at zero, its modulations do too (as in the
original), and the scale of MoVQ's spatial norms starts at one.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from k3jax.config import COMPONENTS, ModelConfig
from k3jax.model.abstract import abstract_module


def random_weights(component: str, config: ModelConfig, seed: int) -> nnx.Module:
    """A component with fresh float32 weights, on this process's first device.

    The same seed gives the same weights on any machine, since nothing is drawn on the device.
    (Compiling an initialiser of a thousand layers would also take minutes.)
    """
    rng = np.random.default_rng([seed, list(COMPONENTS).index(component)])
    module = abstract_module(component, config)
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        shape = variable.get_value().shape
        values = _draw(component, config, tuple(map(str, path)), shape, rng)
        leaf = module
        for part in path:
            leaf = leaf[part] if isinstance(part, int) else getattr(leaf, part)
        leaf.set_value(jnp.asarray(values, jnp.float32))
    return jax.device_put(module, jax.local_devices()[0])


def _draw(component, config, path, shape, rng) -> np.ndarray:
    name = path[-1]
    if name == "scale":
        return np.ones(shape, np.float32)
    if component == "unet" and ("modulation" in path or path[0] == "conv_out"):
        return np.zeros(shape, np.float32)
    if name == "bias":
        return np.ones(shape, np.float32) if "conv_y" in path else np.zeros(shape, np.float32)
    normal = rng.standard_normal(shape, np.float32)
    if component == "text_encoder":
        return normal * np.float32(_t5_std(config.text_encoder, path))
    if name == "null_embedding":
        return normal * np.float32(0.02)
    # PyTorch's default, uniform within 1 / sqrt(fan in), has this standard deviation. A kernel is
    # (h, w, in, out) or (in, out).
    return normal * np.float32((3 * math.prod(shape[:-1])) ** -0.5)


def _t5_std(config, path) -> float:
    """Mesh TensorFlow's initialisation, which compensates the unscaled attention scores."""
    if "embed_tokens" in path:
        return 1.0
    inner = config.num_heads * config.d_kv
    return {
        "q": (config.d_model * config.d_kv) ** -0.5,
        "o": inner**-0.5,
        "wo": config.d_ff**-0.5,
    }.get(path[-2], config.d_model**-0.5)
