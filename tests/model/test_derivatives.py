# SPDX-License-Identifier: Apache-2.0
"""Forward derivatives of the networks, also on a mesh; and the names of their parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k3jax.config import MoVQConfig
from k3jax.model import attention
from k3jax.model.context import Context
from k3jax.sharding import batch_sharding, make_mesh, on_mesh

import tiny
from random_checkpoint import MODEL, random_module


SMALL = dataclasses.replace(
    MODEL,
    text_encoder=dataclasses.replace(MODEL.text_encoder, num_layers=1),
    unet=dataclasses.replace(
        MODEL.unet,
        block_out_channels=(32,),
        add_cross_attention=(True,),
        add_self_attention=(True,),
    ),
    movq=MoVQConfig(block_out_channels=(32, 32), layers_per_block=1),
)


def run_unet(unet, x):
    rng = np.random.default_rng(0)
    states = rng.standard_normal((len(x), 4, 64), np.float32)
    context = Context(states, jnp.zeros((len(x), 4)), jnp.full(len(x), 4))
    return unet(x, jnp.linspace(0, 999, len(x)), context)


def run_text_encoder(encoder, scale):
    ids = np.random.default_rng(0).integers(0, 99, (len(scale), 4))
    return encoder(ids, jnp.ones_like(ids)) * scale[:, None, None]


def run_movq(movq, x):
    return movq.decode(movq.encode(x))


CASES = {
    "unet": (run_unet, (4, 4, 4, 4)),
    "text_encoder": (run_text_encoder, (4,)),
    "movq": (run_movq, (4, 4, 4, 3)),
}


def derivatives(function, *, gradient):
    """(Jv, Jv u, J^T u v) for fixed directions v of weights and inputs, and u of outputs."""

    def run(module, x):
        directions = jax.tree.map(jnp.sin, (module, x))
        out, tangent = jax.jvp(function, (module, x), directions)
        u = jnp.cos(jnp.arange(out.size).reshape(out.shape))
        if not gradient:
            return tangent
        slopes = jax.vjp(function, module, x)[1](u)
        products = jax.tree.map(lambda a, b: (a * b).sum(), slopes, directions)
        return tangent, (tangent * u).sum(), sum(jax.tree.leaves(products))

    return jax.jit(run)


@pytest.mark.parametrize("component", CASES)
def test_forward_derivatives(component, monkeypatch):
    """They agree with the gradients; with attention in the form for large images, too."""
    monkeypatch.setattr(attention, "MANY_SCORES", 0)
    monkeypatch.setattr(attention, "QUERY_CHUNK", 4)
    function, shape = CASES[component]
    module = random_module(component, SMALL, np.random.default_rng(1))
    x = np.random.default_rng(2).standard_normal(shape, np.float32)
    tangent, forward, backward = derivatives(function, gradient=True)(module, x)
    assert np.abs(tangent).max() > 0
    np.testing.assert_allclose(forward, backward, rtol=1e-3)


@pytest.mark.parametrize(
    "component", [pytest.param("unet", marks=pytest.mark.slow), "text_encoder"]
)
def test_forward_derivatives_on_a_mesh(component):
    function, shape = CASES[component]
    module = random_module(component, SMALL, np.random.default_rng(1))
    x = np.random.default_rng(2).standard_normal(shape, np.float32)
    expected = derivatives(function, gradient=False)(module, x)
    mesh = make_mesh("fsdp=2,tensor=2", jax.devices()[:4])
    split = jax.device_put(module, tiny.module_shardings(module, mesh))
    with on_mesh(mesh):
        arrays = jax.device_put(x, batch_sharding(mesh))
        found = derivatives(function, gradient=False)(split, arrays)
    assert tiny.relative_error(found, expected) < 1e-4


@pytest.mark.parametrize(
    "component, names",
    [
        ("unet", ("unet/down_0/resnet", "up_0/attention_block/attention", "context_pooling")),
        ("movq", ("encoder/level/resnet", "decoder/mid_block/attention_block/attention")),
        ("text_encoder", ("layer/self_attention/attention", "layer/mlp")),
    ],
)
def test_profiles_name_the_parts(component, names):
    function, shape = CASES[component]
    module = random_module(component, SMALL, np.random.default_rng(1))
    text = jax.jit(function).lower(module, np.ones(shape, np.float32)).as_text(debug_info=True)
    for name in names:
        assert name in text, name
