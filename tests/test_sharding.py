# SPDX-License-Identifier: Apache-2.0
"""Logical axis names, meshes, and the full-size model on them, without any weights."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from k3jax.config import COMPONENTS, MAX_TOKENS, ModelConfig, SamplerConfig
from k3jax.model.abstract import abstract_module
from k3jax.model.conditioning import Conditioning
from k3jax.model.context import Context
from k3jax.model.movq_strips import strips_on_tpu
from k3jax.pipelines.programs import encode_text
from k3jax.sampling.denoise import LoopState, denoise_program, loop_rows, window
from k3jax.sampling.samplers import make_sampler
from k3jax.sharding import (
    MESH_AXES,
    RULES,
    TRAINING_RULES,
    axes,
    batch_sharding,
    data_parallelism,
    make_mesh,
    on_mesh,
    placed,
    shardings,
)
from k3jax.training.random_weights import random_weights
from k3jax.training.state import weights_of


FULL = ModelConfig()


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_weight_that_is_large_has_known_axes(component):
    names = {name for name, _ in RULES}
    for path, variable in nnx.to_flat_state(nnx.state(abstract_module(component, FULL))):
        used = variable.get_metadata().get("out_sharding") or ()
        assert set(used) <= names | {None}, path
        shape = variable.get_value().shape
        assert len(used) in (0, len(shape)), path
        if np.prod(shape) > 10e6:
            assert any(name is not None for name in used), path


def test_an_unknown_axis_is_an_error():
    class Layer(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jnp.zeros((4, 4)), **axes("embed", "bogus"))

    with pytest.raises(ValueError, match=r"'bogus'.*not in the sharding rules"):
        shardings(Layer(), make_mesh("data=8"))


def test_weights_are_split_as_the_rules_say():
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    where = shardings(abstract_module("text_encoder", FULL), mesh)
    kernel = where["layers"]["mlp"]["wi_0"]["kernel"].get_value()
    assert kernel.spec == P(None, "fsdp", "tensor")
    assert where["final_norm"]["scale"].get_value().spec == P(None)
    unet = shardings(abstract_module("unet", FULL), mesh)
    assert unet["conv_in"]["kernel"].get_value().spec == P(None, None, "fsdp", "tensor")
    # 3 input channels do not split into two: replicated rather than refused.
    movq = shardings(abstract_module("movq", FULL), mesh)
    assert movq["encoder"]["conv_in"]["kernel"].get_value().spec == P(None, None, None, "tensor")


def test_training_splits_the_full_model_over_every_device():
    """Also the weights that read the time embedding, which sampling copies."""
    modules = {name: abstract_module(name, FULL) for name in ("text_projection", "unet")}
    sizes = {name: leaf.shape for name, leaf in weights_of(modules).items()}
    for rules, share in ((TRAINING_RULES, 1 / 8), (RULES, 0.36)):
        where = {
            f"{name}.{'.'.join(map(str, path))}": variable.get_value()
            for name, module in modules.items()
            for path, variable in nnx.to_flat_state(shardings(module, make_mesh("fsdp=8"), rules))
        }
        held = sum(math.prod(where[name].shard_shape(shape)) for name, shape in sizes.items())
        assert held / sum(map(math.prod, sizes.values())) == pytest.approx(share, rel=0.02)


def abstract(shape, dtype, mesh):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))


@pytest.mark.slow
def test_full_size_denoising_lowers_without_weights():
    """50 guided steps at 1024x1024 with batch 8, on a data x tensor mesh."""
    mesh = make_mesh("data=4,tensor=2")
    unet = placed(abstract_module("unet", FULL, "bfloat16"), mesh)
    sampler = make_sampler(SamplerConfig())
    latents = abstract((8, 128, 128, 4), jnp.float32, mesh)
    context = Context(
        abstract((8, MAX_TOKENS, 4096), jnp.bfloat16, mesh),
        abstract((8, MAX_TOKENS), jnp.float32, mesh),
        abstract((8,), jnp.int32, mesh),
    )
    lowered = denoise_program.lower(
        unet,
        Conditioning(context, context, abstract((8,), jnp.float32, mesh)),
        LoopState(latents, latents),
        window(loop_rows(sampler), None, 0, 5)[0],
        abstract((8, 2), jnp.uint32, mesh),
        None,
        step=sampler.step,
        renoise=False,
    )
    latents = jax.tree.leaves(lowered.out_info)[0]
    assert latents.shape == (8, 128, 128, 4) and latents.dtype == jnp.float32
    # One loop over the steps, not 50 copies of the U-Net.
    text = lowered.as_text()
    assert text.count("stablehlo.while") >= 1
    assert text.count("stablehlo.convolution") < 400


@pytest.mark.slow
def test_full_size_text_encoder_and_decoder_lower_without_weights():
    mesh = make_mesh("data=4,tensor=2")
    encoder = placed(abstract_module("text_encoder", FULL, "bfloat16"), mesh)
    ids = abstract((4, MAX_TOKENS), jnp.int32, mesh)
    mask = abstract((4, MAX_TOKENS), jnp.bool_, mesh)
    lowered = encode_text.lower(encoder, ids, mask)
    assert lowered.out_info.shape == (4, MAX_TOKENS, 4096)
    # 32 layers scanned: the program has one layer's matmuls.
    assert lowered.as_text().count("stablehlo.dot_general") < 16

    movq = placed(abstract_module("movq", FULL, "bfloat16"), mesh)
    latents = abstract((4, 128, 128, 4), jnp.float32, mesh)
    decoded = jax.jit(lambda m, x: m.decode(x)).lower(movq, latents)
    assert decoded.out_info.shape == (4, 1024, 1024, 3)
    # Never 16,384 x 16,384 scores, in any of its attention blocks.
    assert "16384x16384" not in decoded.as_text()
    encoded = jax.jit(lambda m, x: m.encode(x)).lower(
        movq, abstract((4, 1024, 1024, 3), jnp.float32, mesh)
    )
    assert encoded.out_info.shape == (4, 128, 128, 4)
    assert "16384x16384" not in encoded.as_text()


@pytest.mark.slow
def test_decoder_memory_at_1024_is_bounded(monkeypatch):
    """Strips against whole maps, on the decoder as released in float32."""
    from k3jax.model import movq_blocks

    movq = abstract_module("movq", FULL)
    latents = jax.ShapeDtypeStruct((1, 128, 128, 4), jnp.float32)

    def temporaries():
        compiled = jax.jit(lambda m, x: m.decode(x)).lower(movq, latents).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    strips = temporaries()
    assert strips < 5.5e9
    monkeypatch.setattr(movq_blocks, "STRIP_PIXELS", 1024**2)
    assert strips < 0.75 * temporaries()


@pytest.mark.parametrize(
    "spec", ["data=2,tensor=4", pytest.param("fsdp=4,tensor=2", marks=pytest.mark.slow)]
)
def test_devices_share_the_strips_of_an_image(spec):
    """MoVQ's decoder as on a TPU: rows go to the device beside; weights are gathered, and the keys
    and values of attention at the latents' size, but no map of an image's."""
    movq = dataclasses.replace(FULL.movq, block_out_channels=(32, 64), layers_per_block=1)
    module = random_weights("movq", dataclasses.replace(FULL, movq=movq), seed=0)
    latents = np.random.default_rng(0).standard_normal((4, 64, 32, 4), np.float32)
    expected = jax.jit(lambda m, x: m.decode(x))(module, latents)

    mesh = make_mesh(spec)
    graph, state = nnx.split(module)
    split = nnx.merge(graph, jax.device_put(state, shardings(module, mesh)))
    x = jax.device_put(latents, batch_sharding(mesh))
    with on_mesh(mesh):
        strips = strips_on_tpu(x)
        decode = jax.jit(lambda m, x: m.decoder(m.post_quant_conv(x), x, strips=strips))
        compiled = decode.lower(split, x).compile()
    assert strips == 8 * mesh.shape["tensor"]
    np.testing.assert_allclose(compiled(split, x), expected, atol=1e-4)
    gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather", compiled.as_text())
    assert gathered
    all_keys = 64 * 32 * 64 * (len(latents) // data_parallelism(mesh))  # of a device's images
    assert max(math.prod(map(int, shape.split(","))) for shape in gathered) <= all_keys


def test_strips_are_for_images_that_fill_a_device():
    def strips(b, height, spec):
        with on_mesh(make_mesh(spec)):
            return strips_on_tpu(jax.ShapeDtypeStruct((b, height, 64, 4), jnp.float32))

    assert strips(8, 128, "data=8") == 8  # one image a device
    assert strips(64, 128, "data=8") == 1  # eight
    assert strips(1, 96, "tensor=8") == 8  # 64 strips of one row and a half there are not
    assert strips(8, 16, "data=8") == 1
    axes = dict(zip(MESH_AXES, (1, 1, 16), strict=True))
    with jax.sharding.use_abstract_mesh(AbstractMesh(tuple(axes.values()), tuple(axes))):
        # 128 strips of one row there are not, and 8 are not enough for 16 devices.
        assert strips_on_tpu(jax.ShapeDtypeStruct((1, 128, 64, 4), jnp.float32)) == 1


@pytest.mark.parametrize("levels", [1, 2, 3, 5])
def test_any_number_of_levels(levels):
    flags = (False, *[True] * max(levels - 1, 3))
    unet = dataclasses.replace(
        FULL.unet,
        block_out_channels=(64,) * levels,
        init_channels=64,
        add_cross_attention=flags,
        add_self_attention=flags,
    )
    module = abstract_module("unet", dataclasses.replace(FULL, unet=unet))
    context = Context(
        jax.ShapeDtypeStruct((1, 8, 4096), jnp.float32),
        jax.ShapeDtypeStruct((1, 8), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    sample = jax.ShapeDtypeStruct((1, 32, 16, 4), jnp.float32)
    out = jax.eval_shape(
        lambda m, *a: m(*a), module, sample, jax.ShapeDtypeStruct((1,), jnp.float32), context
    )
    assert out.shape == sample.shape
