# SPDX-License-Identifier: Apache-2.0
"""The layers' own forms of standard operations are those operations, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from k3jax.model import layers, movq_blocks
from k3jax.model.abstract import abstract_module
from k3jax.model.layers import (
    Upsample2x,
    conv,
    dense,
    group_statistics,
    linear,
    with_fast_cpu_gradients,
)

import tiny


FLOAT32 = dict(dtype=jnp.float32, param_dtype=jnp.float32)


def draw(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


def gradients(function, *inputs):
    """Of a function whose outputs count unequally."""
    value = function(*inputs)
    return jax.jit(
        jax.grad(
            lambda *xs: (
                function(*xs) * jnp.cos(jnp.arange(value.size).reshape(value.shape))
            ).sum(),
            argnums=tuple(range(len(inputs))),
        )
    )(*inputs)


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (2, 3, 4, 5)])
def test_a_dense_product_and_its_gradients(shape):
    x, kernel = draw(*shape), draw(5, 7)
    np.testing.assert_allclose(dense(x, kernel), x @ kernel, rtol=1e-6)
    loss = with_fast_cpu_gradients(lambda x, kernel: dense(jnp.sin(x), kernel))
    assert "custom_vjp" in str(jax.make_jaxpr(loss)(x, kernel))
    assert "custom_vjp" not in str(jax.make_jaxpr(dense)(x, kernel))  # opt-in
    ours = gradients(loss, x, kernel)
    theirs = gradients(lambda x, kernel: jnp.sin(x) @ kernel, x, kernel)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_linear_layer_is_that_of_flax(dtype):
    ours = linear(5, 7, (None, None), dtype=dtype, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    ours.kernel[...], ours.bias[...] = draw(5, 7), draw(7)
    theirs = nnx.Linear(5, 7, dtype=dtype, param_dtype=jnp.float32, rngs=nnx.Rngs(1))
    nnx.update(theirs, nnx.state(ours))
    x = draw(2, 3, 5)
    assert ours(x).dtype == dtype
    np.testing.assert_allclose(
        ours(x).astype(jnp.float32),
        theirs(x).astype(jnp.float32),
        rtol=1e-2 if dtype != jnp.float32 else 1e-6,
    )


def test_a_pointwise_convolution():
    layer = conv(5, 7, 1, **FLOAT32, rngs=nnx.Rngs(0))
    layer.kernel[...], layer.bias[...] = draw(1, 1, 5, 7), draw(7)
    x = draw(2, 4, 3, 5)
    expected = jax.lax.conv_general_dilated(
        x, layer.kernel[...], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(layer(x), expected + layer.bias[...], rtol=1e-5, atol=1e-5)


def test_upsampling_puts_the_kernels_corners_where_pytorch_does():
    layer = Upsample2x(3, **FLOAT32, rngs=nnx.Rngs(0))
    layer.kernel[...], layer.bias[...] = draw(2, 2, 3, 3), draw(3)
    x = draw(2, 4, 5, 3)
    y = np.asarray(layer(x))
    assert y.shape == (2, 8, 10, 3)
    for a in (0, 1):
        for b in (0, 1):
            expected = x @ layer.kernel[...][a, b] + layer.bias[...]
            np.testing.assert_allclose(y[:, a::2, b::2], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strip_pixels", [1, 64, 2**17])
def test_convolving_an_enlarged_map_without_enlarging_it(monkeypatch, strip_pixels):
    monkeypatch.setattr(movq_blocks, "STRIP_PIXELS", strip_pixels)
    layer = conv(5, 7, 3, **FLOAT32, rngs=nnx.Rngs(0))
    layer.kernel[...], layer.bias[...] = draw(3, 3, 5, 7), draw(7)
    x = draw(2, 6, 4, 5)
    ours = jax.jit(movq_blocks.convolve_upsampled)(layer, x)
    expected = layer(movq_blocks.take_rows(x, None, 2))
    assert ours.shape == (2, 12, 8, 7)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_forms_for_tpus_have_the_same_values():
    x, kernel = draw(2, 4, 3, 5), draw(5, 7)
    np.testing.assert_allclose(
        layers._pointwise_on_tpu(x, kernel), dense(x, kernel), rtol=1e-5, atol=1e-5
    )
    kernel = draw(2, 2, 5, 7)
    np.testing.assert_allclose(
        layers._upsample_on_tpu(x, kernel),
        layers._upsample_by_products(x, kernel),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("strips", [1, 3])
@pytest.mark.parametrize(
    "dtype, mean, tolerance", [(jnp.float32, 1000, 1e-4), (jnp.bfloat16, 10, 1e-4)]
)
def test_statistics_of_groups(dtype, mean, tolerance, strips):
    """Also where the means are large beside what varies, as float32 and bfloat16 can hold it."""
    x = (draw(2 * strips, 8, 16, 6) + mean * jnp.arange(1, 7)).astype(dtype)
    got = group_statistics(x, 6, 0.0, strips)
    images = np.asarray(x.astype(jnp.float32), np.float64).reshape(2, -1, 6)
    expected = images.mean(1), 1 / images.std(1)
    for ours, theirs in zip(got, expected, strict=True):
        ours = np.asarray(ours).reshape(2, strips, 6)
        np.testing.assert_allclose(ours, np.repeat(theirs[:, None], strips, 1), rtol=tolerance)
    # A group of channels whose means differ.
    mean, inverse_std = group_statistics(x, 2, 0.0, strips)
    grouped = images.reshape(2, -1, 2, 3)
    expected = 1 / grouped.std((1, 3))
    ours = np.asarray(inverse_std).reshape(2, strips, 2, 3)[:, 0, :, 0]
    np.testing.assert_allclose(ours, expected, rtol=tolerance)


def test_abstract_modules_are_independent():
    """They are clones of one that is kept: a change to one must not reach the next."""
    config = tiny.CONFIG
    first, second = (abstract_module("text_projection", config) for _ in range(2))
    first.linear.kernel.set_value(None)
    first.dtype = None
    for module in (second, abstract_module("text_projection", config)):
        assert module.linear.kernel.get_value().shape == (32, 48) and module.dtype == jnp.float32
    other = abstract_module("text_projection", config, "bfloat16", "float32")
    assert other.linear.kernel.get_value().dtype == jnp.bfloat16 and other.dtype == jnp.float32
