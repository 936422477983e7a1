# SPDX-License-Identifier: Apache-2.0
"""Adapters by name: several at once, strengths, removal; the base is never changed."""

import dataclasses

import jax
import numpy as np
import pytest

from k3jax.checkpoints.lora_files import save_lora
from k3jax.config import LoraConfig
from k3jax.model.adapters import merge, update_factor
from k3jax.model.context import Context
from k3jax.pipelines.adapters import AdaptedUNet
from k3jax.sharding import make_mesh
from k3jax.training.tasks.lora_finetuning import init_lora

import tiny
from random_checkpoint import MODEL, random_module


UNET = dataclasses.replace(
    MODEL.unet,
    block_out_channels=(32,),
    add_cross_attention=(True,),
    add_self_attention=(True,),
)
CONFIGS = {
    "style": LoraConfig(rank=2, alpha=4.0),
    "subject": LoraConfig(rank=3, targets=("to_q", "to_v")),
}

FINGERPRINT = f"sha256:{0:064}"


class Pipe(AdaptedUNet):
    """As much of a pipeline as adapters need."""

    def __init__(self, unet):
        self.unet, self.fingerprint = unet, FINGERPRINT
        self.mesh = make_mesh("data=1", jax.devices()[:1])


@jax.jit
def run(unet):
    rng = np.random.default_rng(0)
    states = rng.standard_normal((2, 4, UNET.cross_attention_dim), np.float32)
    context = Context(states, np.zeros((2, 4), np.float32), np.full(2, 4, np.int32))
    return unet(rng.standard_normal((2, 4, 4, 4), np.float32), np.float32([900, 100]), context)


@pytest.fixture(scope="module")
def unet():
    return random_module("unet", dataclasses.replace(MODEL, unet=UNET), np.random.default_rng(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, unet):
    """Folder and weights of each adapter."""
    folder, rng = tmp_path_factory.mktemp("loras"), np.random.default_rng(1)
    weights = {name: init_lora(unet, config) for name, config in CONFIGS.items()}
    for name, layers in weights.items():
        for pair in layers.values():
            pair["b"] = 0.2 * rng.standard_normal(pair["b"].shape, np.float32)
        save_lora(folder / name, layers, CONFIGS[name], FINGERPRINT)
    return {name: (folder / name, layers) for name, layers in weights.items()}


def test_names_and_strengths(unet, folders):
    pipe, scales = Pipe(unet), {"style": 0.5, "subject": -0.7}
    plain, expected = np.asarray(run(unet)), unet
    for name, (folder, weights) in folders.items():
        assert pipe.load_lora(folder, scales[name], name).config == CONFIGS[name]
        expected = merge(expected, weights, update_factor(CONFIGS[name], scales[name]))
    both = np.asarray(run(pipe.unet))
    assert tiny.relative_error(both, run(expected)) < 1e-5
    assert tiny.relative_error(both, plain) > 0.01

    compiled = run._cache_size()
    pipe.set_adapters("style", 0.5)
    one = Pipe(unet)
    one.load_lora(folders["style"][0], 0.5)
    style = run(pipe.unet)
    pipe.set_adapters(["style", "subject"], [0.5, -0.7])
    np.testing.assert_array_equal(run(pipe.unet), both)
    pipe.set_adapters([])
    np.testing.assert_array_equal(run(pipe.unet), plain)
    assert run._cache_size() == compiled  # for any strength
    assert tiny.relative_error(style, run(one.unet)) < 1e-5

    pipe.set_adapters("style", 0.5)
    pipe.unload_lora("subject")
    np.testing.assert_array_equal(run(pipe.unet), run(one.unet))
    pipe.unload_lora()
    assert pipe.unet is unet and one.unet is not unet


def test_without_a_name_the_second_replaces_the_first(unet, folders):
    pipe, one = Pipe(unet), Pipe(unet)
    pipe.load_lora(folders["subject"][0])
    pipe.load_lora(folders["style"][0], scale=2.0)
    one.load_lora(folders["style"][0], scale=2.0, name="style")
    for found, expected in zip(jax.tree.leaves(pipe.unet), jax.tree.leaves(one.unet), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_what_is_not_loaded_is_refused(unet, folders):
    pipe = Pipe(unet)
    pipe.unload_lora()  # nothing to do
    with pytest.raises(ValueError, match=r"'style'.*loaded are: none"):
        pipe.set_adapters("style")
    pipe.load_lora(folders["style"][0], name="style")
    for call in (lambda: pipe.set_adapters("other"), lambda: pipe.unload_lora("other")):
        with pytest.raises(ValueError, match=r"'other'.*loaded are: style"):
            call()
    with pytest.raises(ValueError, match=r"2 names .* 1 weights"):
        pipe.set_adapters(["style", "subject"], [0.5])
    with pytest.raises(ValueError, match="scale is nan"):
        pipe.set_adapters("style", float("nan"))
