# SPDX-License-Identifier: Apache-2.0
"""All forms of attention agree, and each is used where it should be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import k3jax.model.attention
from k3jax.checkpoints.restore import restore
from k3jax.model import tpu_attention
from k3jax.model.abstract import abstract_module
from k3jax.model.attention import (
    MANY_SCORES,
    attention,
    check_attention_form,
    chunked_attention,
    plain_attention,
)
from k3jax.sharding import make_mesh, on_mesh

import tiny


def draw(*shape, scale=1.0, dtype=jnp.float32):
    rng = np.random.default_rng(sum(shape))
    return jnp.asarray(rng.normal(size=shape) * scale, dtype)


def inputs(b, q, k, heads, d, **kwargs):
    return (
        draw(b, q, heads, d, **kwargs),
        draw(b, k, heads, d, **kwargs) + 0.1,
        draw(b, k, heads, d),
    )


def some_keys(b, k):
    """A bias (b, 1, 1, k) that takes out two of three keys, but not the first."""
    index = np.arange(b * k).reshape(b, 1, 1, k)
    return jnp.where(jnp.asarray(index % 3 == 0).at[..., 0].set(True), 0.3 * index / k, -jnp.inf)


def in_kernel(query, key, value, bias=None, *, scale):
    flat = [x.reshape(*x.shape[:2], -1) for x in (query, key, value)]
    bias = None if bias is None else bias[:, 0, 0]
    heads = query.shape[2]
    out = tpu_attention.tpu_attention(*flat, bias, heads=heads, scale=scale, interpret=True)
    return out.reshape(query.shape)


def gradients(function, *arrays):
    """Of a function whose outputs count unequally."""

    def loss(*arrays):
        out = function(*arrays)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 48, 48, 2, 64),  # two heads in a block
        (1, 40, 24, 4, 64),
        (1, 520, 16, 4, 32),  # four in one, and two blocks of queries
        (1, 32, 48, 1, 256),  # one head of two registers
        (1, 32, 16, 3, 64),  # half of the second block is empty
    ],
)
def test_the_kernel_is_attention(shape, biased):
    arrays = inputs(*shape)
    bias = some_keys(shape[0], shape[2]) if biased else None
    expected = plain_attention(*arrays, bias, scale=0.1)
    np.testing.assert_allclose(in_kernel(*arrays, bias, scale=0.1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(1, 40, 96, 2, 64), (2, 32, 75, 1, 128)])
def test_the_kernel_with_keys_in_several_blocks(shape, biased, monkeypatch):
    monkeypatch.setattr(tpu_attention, "_blocks", lambda *sizes: (16, 32))
    tpu_attention.tpu_attention.clear_cache()
    arrays = inputs(*shape)
    bias = some_keys(shape[0], shape[2]) if biased else None
    if biased:  # a first block without any key
        bias = bias.at[..., :32].set(-jnp.inf)
    expected = plain_attention(*arrays, bias, scale=0.1)
    found = in_kernel(*arrays, bias, scale=0.1)
    tpu_attention.tpu_attention.clear_cache()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_kernel_with_any_scores():
    """Scores in the thousands, far below and far above zero, as no bound could shift them."""
    query, key, value = inputs(1, 32, 48, 2, 64, scale=30.0)
    key = key.at[:, :, 0].add(-100.0)
    expected = plain_attention(query, key, value, scale=1.0)
    assert jnp.isfinite(expected).all()
    np.testing.assert_allclose(in_kernel(query, key, value, scale=1.0), expected, atol=1e-3)


def test_the_kernel_in_bfloat16():
    arrays = [x.astype(jnp.bfloat16) for x in inputs(1, 32, 48, 2, 64)]
    found = in_kernel(*arrays, scale=0.125)
    assert found.dtype == jnp.bfloat16
    expected = plain_attention(*(x.astype(jnp.float32) for x in arrays), scale=0.125)
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=0.02, atol=0.01)


def test_blocks_fit_in_the_memory_of_a_chip():
    for keys in (128, 4096, 4032, 16384, 65536):
        for lanes in (128, 512):
            q, k = tpu_attention._blocks(4096, keys, lanes)
            assert tpu_attention.SCORE_BYTES * q * k + 8 * k * lanes <= tpu_attention.BUDGET
            assert k == keys or k % tpu_attention.LANES == 0
    with pytest.raises(ValueError, match="8192 channels do not fit"):
        tpu_attention._blocks(4096, 4096, 8192)


def test_attention_in_chunks_and_its_gradients():
    arrays = inputs(2, 10, 7, 3, 4)
    whole = functools.partial(attention, scale=0.5)
    chunked = functools.partial(chunked_attention, scale=0.5, chunk=4)
    np.testing.assert_allclose(chunked(*arrays), whole(*arrays), rtol=1e-5, atol=1e-6)
    bias = some_keys(2, 7)
    np.testing.assert_allclose(
        chunked(*arrays, bias), whole(*arrays, bias=bias), rtol=1e-5, atol=1e-6
    )
    for one, other in zip(gradients(chunked, *arrays), gradients(whole, *arrays), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


MESHES = ["data=8", "data=2,tensor=4", "fsdp=2,tensor=4", "data=2,fsdp=2,tensor=2", "tensor=8"]


def on_the_mesh(spec, function, *arrays):
    """What a function of arrays gives on a mesh."""
    mesh = make_mesh(spec)
    with on_mesh(mesh):
        return jax.jit(function)(*jax.device_put(arrays, NamedSharding(mesh, PartitionSpec())))


def on_meshes(cases, default):
    """Every case on every mesh; those that are not in `default` are slow."""
    return [
        pytest.param(mesh, case, marks=() if (mesh, case) in default else pytest.mark.slow)
        for mesh in MESHES
        for case in cases
    ]


@pytest.mark.parametrize(
    "mesh, heads", on_meshes((4, 3), [("data=8", 4), ("data=2,tensor=4", 3), (MESHES[3], 4)])
)
def test_the_kernel_on_a_mesh(mesh, heads, monkeypatch):
    """Each device has its own heads, or its own queries where heads do not divide; one head of 64
    alone is half a block."""
    interpreted = functools.partial(tpu_attention.tpu_attention, interpret=True)
    monkeypatch.setattr(tpu_attention, "tpu_attention", interpreted)
    monkeypatch.setattr(k3jax.model.attention, "MANY_SCORES", 0)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, tpu, default: tpu(*x))
    arrays = inputs(8, 136, 16, heads, 64)
    bias = some_keys(8, 16)
    ours = functools.partial(attention, scale=0.125)
    expected = functools.partial(plain_attention, scale=0.125)
    found = on_the_mesh(mesh, lambda q, k, v, b: ours(q, k, v, bias=b), *arrays, bias)
    np.testing.assert_allclose(found, expected(*arrays, bias), rtol=1e-5, atol=1e-5)
    slopes = on_the_mesh(
        mesh, lambda *xs: gradients(lambda *qkv: ours(*qkv, bias=xs[3]), *xs[:3]), *arrays, bias
    )
    for one, other in zip(slopes, gradients(lambda *xs: expected(*xs, bias), *arrays), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


SHAPES = [(8, 12, 16, 6, 8), (8, 3, 5, 6, 8), (3, 12, 16, 8, 8)]


@pytest.mark.parametrize(
    "mesh, shape", on_meshes(SHAPES, list(zip(MESHES[1:4], SHAPES, strict=True)))
)
def test_any_shape_on_any_mesh(mesh, shape):
    """Six heads over four or eight devices, and their queries' tokens, or neither; any batch."""
    rng = np.random.default_rng(0)
    arrays, (b, q, k, heads, _) = inputs(*shape), shape
    for bias_shape in ((1, heads, q, k), (b, heads, q, k), (b, 1, 1, k), (1, 1, 1, 1)):
        bias = rng.standard_normal(bias_shape, np.float32)
        found = on_the_mesh(mesh, functools.partial(attention, scale=0.5, bias=bias), *arrays)
        np.testing.assert_allclose(
            found, plain_attention(*arrays, bias, scale=0.5), rtol=1e-5, atol=1e-5
        )


def lowered_for(platform, *shape, mesh="data=-1", dtype=jnp.bfloat16, bias=None, form="auto"):
    query, key, value = (
        jax.ShapeDtypeStruct(x.shape, dtype) for x in jax.eval_shape(lambda: inputs(*shape))
    )
    program = jax.jit(functools.partial(attention, scale=0.125, bias=bias, form=form))
    with on_mesh(make_mesh(mesh)):
        traced = program.trace(query, key, value)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_where_the_kernel_is_used():
    many = (8, 1024, MANY_SCORES // 1024, 4, 64)
    assert "tpu_custom_call" in lowered_for("tpu", *many)
    assert "tpu_custom_call" in lowered_for("tpu", *many, mesh="data=-1,tensor=2")
    same_for_all = jnp.zeros((1, 1, 1, MANY_SCORES // 1024))
    assert "tpu_custom_call" in lowered_for("tpu", *many, bias=same_for_all)
    few = (8, 512, MANY_SCORES // 1024, 4, 64)
    assert "tpu_custom_call" not in lowered_for("tpu", *few)
    assert "tpu_custom_call" not in lowered_for("cpu", *many)
    # Each device computes all of four images that do not split over eight.
    assert "tpu_custom_call" in lowered_for("tpu", 4, *many[1:])
    assert "tpu_custom_call" not in lowered_for("tpu", *many[:3], 4, 48)
    positions = jnp.zeros((1, 4, 1024, MANY_SCORES // 1024))
    assert "tpu_custom_call" not in lowered_for("tpu", *many, bias=positions)


def test_the_switch_of_attention():
    many = (8, 1024, MANY_SCORES // 1024, 4, 64)
    assert "tpu_custom_call" not in lowered_for("tpu", *many, form="xla")
    assert "tpu_custom_call" in lowered_for("tpu", *many, form="kernel")
    with pytest.raises(ValueError, match=r"'kernel'.*1024 queries with heads of 48 channels"):
        lowered_for("tpu", *many[:3], 4, 48, form="kernel")
    for component in ("unet", "text_encoder", "movq"):
        module = abstract_module(component, tiny.CONFIG, attention="xla")
        forms = [x.attention_form for _, x in nnx.iter_modules(module) if hasattr(x, "to_out")]
        assert set(forms) <= {"xla"} and (forms or module.layers.attention.attention_form == "xla")
    movq = restore("tiny", "movq", attention="xla")
    assert movq.decoder.mid_block.attentions[0].attention_form == "xla"
    with pytest.raises(ValueError, match=r"attention is 'kernel'.*on cpu"):
        restore("tiny", "movq", attention="kernel")


@pytest.mark.parametrize(
    "form, platform, dtype, message",
    [
        ("kernel", "cpu", "bfloat16", "'kernel'.* bfloat16 on cpu"),
        ("kernel", "gpu", "float32", "'kernel'.* float32 on gpu"),
        ("flash", "tpu", "bfloat16", "'flash'.*auto"),
    ],
)
def test_forms_that_do_not_exist(form, platform, dtype, message):
    with pytest.raises(ValueError, match=message):
        check_attention_form(form, platform, dtype)
    check_attention_form("kernel", "tpu", "float32")
    check_attention_form("kernel", "gpu", "bfloat16")


def test_where_cudnn_is_used(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    many = (8, 1024, MANY_SCORES // 1024, 4, 64)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda *args: True)
    assert "__cudnn$fmha" in lowered_for("cuda", *many)
    assert "__cudnn$fmha" not in lowered_for("cuda", *many, dtype=jnp.float32)
    assert "__cudnn$fmha" not in lowered_for("cuda", *many[:3], 1, 512)
    assert "__cudnn$fmha" not in lowered_for("cuda", 8, 64, 64, 4, 64)
