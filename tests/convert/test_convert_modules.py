# SPDX-License-Identifier: Apache-2.0
"""State dicts in memory to modules and back, and the moving of bits underneath."""

import itertools

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from k3jax.convert import keys
from k3jax.convert.arrays import as_numpy, as_torch, is_finite, permuted
from k3jax.convert.modules import module_to_state_dict, state_dict_to_module
from k3jax.convert.rules import ConversionError, Rule, to_jax_array, to_torch_array
from k3jax.model.abstract import abstract_module

import tiny
import torch_checkpoints


TABLES = {
    "text_encoder": keys.table("text_encoder"),
    "unet": keys.table("unet"),
    "movq": keys.table("movq"),
}


@pytest.mark.parametrize(
    "component, dtype",
    [("text_encoder", torch.float32), ("unet", torch.bfloat16), ("movq", torch.float16)],
    ids=str,
)
def test_state_dicts_come_back_bit_for_bit(component, dtype):
    state = torch_checkpoints.cast(torch_checkpoints.state_dicts()[component], dtype)
    table = TABLES[component]
    module = abstract_module(component, tiny.SHALLOW, str(dtype).removeprefix("torch."))
    back = module_to_state_dict(table, state_dict_to_module(table, state, module))
    kept = {name: tensor for name, tensor in state.items() if not table.ignores(name)}
    assert back.keys() == kept.keys()
    for name, tensor in kept.items():
        assert back[name].dtype == dtype and torch.equal(back[name], tensor), name


def test_the_forks_names_hold_the_projection():
    width = tiny.PROJECTION.cross_attention_dim
    state = {
        "projection_lin.weight": torch.randn(width, tiny.PROJECTION.d_model),
        "projection_ln.weight": torch.randn(width),
        "projection_ln.bias": torch.randn(width),
        "in_layer.weight": torch.zeros(1),
    }
    module = abstract_module("text_projection", tiny.SHALLOW)
    table = keys.table("text_projection", "fork")
    state_dict_to_module(table, state, module)
    np.testing.assert_array_equal(module.linear.kernel[...], state["projection_lin.weight"].T)
    assert all(
        keys.table("unet", "original").ignores(name) for name in state if "projection" in name
    )


def test_loading_casts_to_the_dtype_of_the_module():
    state = torch_checkpoints.state_dicts()["text_encoder"]
    module = abstract_module("text_encoder", tiny.SHALLOW, "bfloat16")
    state_dict_to_module(TABLES["text_encoder"], state, module)
    assert module.layers.mlp.wo.kernel.dtype == jnp.bfloat16
    ours = np.asarray(module.layers.mlp.wo.kernel[...])[1]
    theirs = state["encoder.block.1.layer.1.DenseReluDense.wo.weight"].T
    np.testing.assert_array_equal(ours, theirs.numpy().astype(ml_dtypes.bfloat16))


def test_all_faults_are_reported_together():
    state = dict(torch_checkpoints.state_dicts()["unet"])
    state["conv_in.bias"] = torch.zeros(5)
    state["conv_out.weight"] = torch.zeros(4, 16, 3)
    state["up_blocks.9.wrong"] = torch.zeros(2, 3)
    del state["conv_norm_out.weight"]
    state["down_blocks.0.attentions.0.feed_forward.0.weight"] = torch.zeros(2, 2, 1, 1)
    bias = state["conv_norm_out.bias"].clone()
    bias[1] = torch.nan
    state["conv_norm_out.bias"] = bias
    with pytest.raises(ConversionError) as caught:
        state_dict_to_module(TABLES["unet"], state, abstract_module("unet", tiny.SHALLOW))
    assert str(caught.value).count("\n") == 4 and len(caught.value.faults) == 6
    text = "\n".join(map(str, caught.value.faults))
    for part in (
        "conv_in.bias (conv_in.bias) has shape (5); the model has (16)",
        "conv_out.weight (conv_out.kernel) has shape (4, 16, 3); the model has (4, 16, 3, 3)",
        "unknown tensor up_blocks.9.wrong of shape (2, 3)",
        "missing tensor conv_norm_out.weight of shape (16) (our norm_out.scale)",
        "down_blocks.0.self_attention.feed_forward_in.kernel, which a model of this configuration",
        "conv_norm_out.bias holds NaN",
    ):
        assert part in text


def test_second_names_must_hold_the_same_values():
    state = dict(torch_checkpoints.state_dicts()["text_encoder"])
    state["encoder.embed_tokens.weight"] = state["shared.weight"] + 1
    with pytest.raises(ConversionError, match="have different values"):
        module = abstract_module("text_encoder", tiny.SHALLOW)
        state_dict_to_module(TABLES["text_encoder"], state, module)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_permuted_is_transpose(dtype):
    rng = np.random.default_rng(0)
    for axes in range(1, 5):
        for order in itertools.permutations(range(axes)):
            array = rng.standard_normal(rng.integers(1, 7, axes)).astype(dtype)
            array.flags.writeable = False  # as a memory map is
            moved = permuted(array, order)
            assert moved.flags.c_contiguous and moved.dtype == array.dtype
            np.testing.assert_array_equal(moved, array.transpose(order))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_nan_payloads_survive_and_are_seen(dtype):
    bits = np.random.default_rng(1).integers(0, 256, (64, 48, np.dtype(dtype).itemsize), np.uint8)
    array = bits.view(dtype)[..., 0]
    assert not is_finite(array)
    rule = Rule("w", "k", "o i -> i o")
    back = to_torch_array(rule, to_jax_array(rule, array))
    assert back.tobytes() == array.tobytes()
    assert as_numpy(as_torch(array)).tobytes() == array.tobytes()
    for value in (np.nan, np.inf, -np.inf):
        array = np.zeros((3, 5), dtype)
        assert is_finite(array)
        array[2, 4] = value
        assert not is_finite(array)
