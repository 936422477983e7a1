# SPDX-License-Identifier: Apache-2.0
"""LoRA: applied, merged, trained, saved, refused, and in the pipeline."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from k3jax.checkpoints.format import read_checkpoint
from k3jax.checkpoints.lora_files import load_lora, save_lora
from k3jax.checkpoints.restore import save_module
from k3jax.checkpoints.writer import CheckpointWriter
from k3jax.config import COMPONENTS, LoraConfig, UNetConfig
from k3jax.files import LFS_POINTER, CheckpointError
from k3jax.model import adapters
from k3jax.model.abstract import abstract_module
from k3jax.model.context import Context
from k3jax.pipelines.text_to_image import Kandinsky3Pipeline
from k3jax.sampling.denoise import denoise_program
from k3jax.sharding import make_mesh, shardings
from k3jax.training.result import merged_checkpoint
from k3jax.training.tasks.lora_finetuning import init_lora

from random_checkpoint import random_module, write_byte_tokenizer
from training_models import MODEL, UNET, module_shardings, relative_error


CONFIG = LoraConfig(rank=2, alpha=4.0)
FACTOR = adapters.update_factor(CONFIG)
ROUNDING = 2e-6  # of the output's scale: float32, through a U-Net


def trained(unet, config=CONFIG, seed=0):
    """A LoRA whose B is not zero any more."""
    weights, rng = init_lora(unet, config, seed), np.random.default_rng(seed)
    for pair in weights.values():
        pair["b"] = 0.2 * rng.standard_normal(pair["b"].shape, np.float32)
    return weights


def inputs(batch=4, seed=0):
    rng = np.random.default_rng(seed)
    lengths = np.arange(2, 2 + batch, dtype=np.int32)
    bias = np.where(np.arange(6) < lengths[:, None], 0, -np.inf).astype(np.float32)
    states = rng.standard_normal((batch, 6, UNET.cross_attention_dim), np.float32)
    sample = rng.standard_normal((batch, 8, 8, 4), np.float32)
    return sample, np.linspace(1, 999, batch, dtype=np.float32), Context(states, bias, lengths)


@jax.jit
def call(unet, sample, timesteps, context):
    return unet(sample, timesteps, context)


@jax.jit
def call_with(unet, weights, factor, sample, timesteps, context):
    return adapters.apply(unet, weights, factor)(sample, timesteps, context)


@pytest.fixture(scope="module")
def unet():
    return random_module("unet", MODEL, np.random.default_rng(0))


@pytest.fixture(scope="module")
def weights(unet):
    return trained(unet)


@pytest.fixture(scope="module")
def base(unet):
    return np.asarray(call(unet, *inputs()))


@pytest.fixture(scope="module")
def applied(unet, weights):
    return np.asarray(call_with(unet, weights, FACTOR, *inputs()))


def test_every_attention_has_one(unet):
    weights = init_lora(abstract_module("unet", MODEL), CONFIG)
    assert weights["context_pooling.attention.to_q"]["a"].shape == (UNET.cross_attention_dim, 2)
    assert weights["context_pooling.attention.to_out"]["b"].shape == (2, UNET.time_embedding_dim)
    attentions = {name.rpartition(".")[0] for name in weights}
    assert len(weights) == 4 * len(attentions)
    assert "down_blocks.0.self_attention.attention" in attentions
    assert "down_blocks.0.cross_attentions.1.attention" in attentions
    found = [path for path, _ in nnx.to_flat_state(nnx.state(unet)) if path[-2] == "to_v"]
    assert len(found) == len(attentions)


def test_the_released_unet_has_25_attentions():
    abstract = abstract_module("unet", dataclasses.replace(MODEL, **full_unet()))
    assert len(adapters.target_shapes(abstract, LoraConfig())) == 4 * 25


def full_unet():
    projection = dataclasses.replace(MODEL.text_projection, cross_attention_dim=4096)
    return {"unet": UNetConfig(), "text_projection": projection}


def test_a_new_one_changes_nothing(unet, base, weights):
    """Bit for bit: with B zero, and with a scale of zero."""
    new = init_lora(unet, CONFIG)
    np.testing.assert_array_equal(call_with(unet, new, FACTOR, *inputs()), base)
    np.testing.assert_array_equal(call_with(unet, weights, 0.0, *inputs()), base)


def test_merged_is_applied(unet, weights, base, applied):
    assert relative_error(base, applied) > 0.01
    merged = adapters.merge(unet, weights, FACTOR)
    assert relative_error(call(merged, *inputs()), applied) < ROUNDING
    np.testing.assert_array_equal(call(unet, *inputs()), base)  # the base is as it was
    outside = adapters.apply(unet, weights, FACTOR)
    assert relative_error(call(outside, *inputs()), applied) < ROUNDING


def test_the_low_rank_path_is_kept(unet, weights):
    """No kernel W + A B is made: all products that lead to a kernel's shape would show here."""
    jaxpr = jax.make_jaxpr(adapters.apply)(unet, weights, 1.0)
    assert "dot_general" not in str(jaxpr)


def test_in_bfloat16(unet, weights):
    half = abstract_module("unet", MODEL, "bfloat16")
    half = nnx.merge(
        nnx.split(half)[0], jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(unet))
    )
    layer = adapters.apply(half, weights, FACTOR).context_pooling.attention.to_q
    assert layer(jnp.ones((1, UNET.cross_attention_dim))).dtype == jnp.bfloat16
    assert layer.b[...].dtype == jnp.float32


def test_only_its_weights_get_gradients(unet, weights):
    remat = jax.tree.map(lambda x: x, unet)
    remat.remat = True

    @jax.jit
    def gradients(weights, unet):
        def loss(weights):
            return jnp.square(adapters.apply(unet, weights, FACTOR)(*inputs(2))).mean()

        return jax.grad(loss)(weights)

    found = gradients(weights, remat)
    assert jax.tree.structure(found) == jax.tree.structure(weights)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found))
    # At the start only B learns: the gradient of A is a product with B.
    start = gradients(init_lora(unet, CONFIG), remat)
    assert all(not np.any(pair["a"]) and np.any(pair["b"]) for pair in start.values())


@pytest.mark.slow
def test_sharded_is_unsharded(unet, weights, applied):
    mesh = make_mesh("fsdp=2,tensor=2", jax.devices()[:4])
    placed = jax.device_put(unet, module_shardings(unet, mesh))
    where = adapters.lora_shardings(unet, weights, mesh)
    pair = where["down_blocks.0.self_attention.attention.to_q"]
    assert pair["a"].spec == P("fsdp", None) and pair["b"].spec == P(None, "tensor")
    split = jax.device_put(weights, where)
    got = call_with(placed, split, FACTOR, *inputs())
    assert relative_error(got, applied) < ROUNDING
    merged = adapters.merge(placed, split, FACTOR)
    kernels = zip(
        jax.tree.leaves(nnx.state(merged)), jax.tree.leaves(shardings(unet, mesh)), strict=True
    )
    assert all(kernel.sharding.is_equivalent_to(to, kernel.ndim) for kernel, to in kernels)


def test_saved_is_loaded(unet, weights, tmp_path):
    save_lora(tmp_path / "lora", weights, CONFIG, "f" * 64)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lora"]
    loaded = load_lora(tmp_path / "lora")
    assert loaded.config == CONFIG and loaded.base_fingerprint == "f" * 64
    assert jax.tree.structure(loaded.weights) == jax.tree.structure(dict(weights))
    jax.tree.map(np.testing.assert_array_equal, loaded.weights, dict(weights))
    fingerprint = loaded.fingerprint

    with pytest.raises(CheckpointError, match="exists already: choose another folder"):
        save_lora(tmp_path / "lora", weights, CONFIG, "")
    save_lora(tmp_path / "lora", trained(unet, seed=1), CONFIG, "", overwrite=True)
    other = load_lora(tmp_path / "lora")
    assert other.base_fingerprint == "" and other.fingerprint != fingerprint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lora"]
    with pytest.raises(CheckpointError, match="exists and is not a LoRA"):
        save_lora(tmp_path, weights, CONFIG, "", overwrite=True)


def test_what_cannot_be_read_is_refused(weights, tmp_path):
    def refused(message):
        with pytest.raises(CheckpointError, match=message) as error:
            load_lora(tmp_path / "lora")
        assert "\n" not in str(error.value) and str(error.value).endswith(".")

    refused("There is no LoRA at .*: the folder does not exist")
    (tmp_path / "lora").mkdir()
    refused("it has no lora.json")
    (tmp_path / "lora").rmdir()
    save_lora(tmp_path / "lora", weights, CONFIG, "")

    arrays, settings = tmp_path / "lora" / "weights.npz", tmp_path / "lora" / "lora.json"
    good = arrays.read_bytes()
    arrays.write_bytes(good[: len(good) // 2])
    refused("is damaged")
    place = len(good) // 2
    arrays.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    refused("is damaged")
    arrays.write_bytes(good)
    values = json.loads(settings.read_text())
    settings.write_text(json.dumps(values | {"format_version": 2}))
    refused("has format version 2, but this k3jax reads 1: upgrade")
    settings.write_text(json.dumps(values | {"lora": {**values["lora"], "rank": 3}}))
    refused("has rank 2 and 2, .* 3")
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"alpha": float("nan")}):
        settings.write_text(json.dumps(values | {"lora": {**values["lora"], **wrong}}))
        refused(r"lora\.json: rank is .* and alpha .*; both must be above 0")
    settings.write_text(json.dumps(values | {"lora": [2]}))
    refused(r"lora\.json is damaged: it has no settings of a LoRA")
    settings.write_text("{")
    refused("is damaged")
    settings.write_text(json.dumps(values))
    arrays.write_bytes(LFS_POINTER + b"v1")
    refused(r"weights\.npz is a git-lfs pointer")


def test_values_that_are_no_numbers_are_refused(weights, tmp_path):
    name = next(iter(weights))
    for number in (np.nan, np.inf):
        pair = {**weights[name], "b": np.full_like(weights[name]["b"], number)}
        save_lora(tmp_path / "lora", {**weights, name: pair}, CONFIG, "", overwrite=True)
        with pytest.raises(CheckpointError, match=f"has NaN or infinite values in {name}: train"):
            load_lora(tmp_path / "lora")


def test_another_architecture_is_refused(unet, weights):
    name = "context_pooling.attention.to_q"
    others = {
        "1 unknown: context_pooling.attention.to_x": {**weights, f"{name[:-1]}x": weights[name]},
        "1 missing: context_pooling.attention.to_q": {
            k: v for k, v in weights.items() if k != name
        },
        r"1 of another shape: context_pooling.attention.to_q \(\(16, 2\) x \(3, 16\)": {
            **weights,
            name: {"a": weights[name]["a"], "b": np.zeros((3, 16), np.float32)},
        },
    }
    for message, other in others.items():
        with pytest.raises(CheckpointError, match=f"is for another architecture .*; {message}"):
            adapters.check_fits(other, unet, CONFIG)
    wide = abstract_module("unet", dataclasses.replace(MODEL, **full_unet()))
    with pytest.raises(CheckpointError, match=r"missing: .*, \d+ more; \d+ of another shape"):
        adapters.check_fits(weights, wide, CONFIG)


@pytest.mark.parametrize(
    "config, message",
    [
        (LoraConfig(targets=("to_q", "query")), "no linear layer called query .*to_k, to_out"),
        (LoraConfig(targets=()), "no linear layer called nothing"),
        (LoraConfig(rank=0), "rank is 0; it must be 1 or more"),
        (LoraConfig(alpha=0.0), "alpha is 0.0; it must be more than 0"),
    ],
)
def test_settings_without_sense_are_refused(unet, config, message):
    with pytest.raises(ValueError, match=message):
        init_lora(unet, config)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, unet):
    folder = tmp_path_factory.mktemp("lora")
    write_byte_tokenizer(folder / "tokenizer")
    with CheckpointWriter(folder / "base") as writer:
        writer.add_tokenizer(folder / "tokenizer")
        for number, name in enumerate(COMPONENTS):
            module = random_module(name, MODEL, np.random.default_rng(number))
            save_module(writer, name, unet if name == "unet" else module)
        writer.commit(MODEL, {"layout": "demo"}, "float32")
    return folder / "base"


def make(pipe):
    return pipe(
        ["a cat", "a dog"],
        height=64,
        width=64,
        num_inference_steps=2,
        sampler="ddim",
        guidance_scale=0,
        output_type="latent",
        progress_bar=False,
    ).images


def test_pipeline(checkpoint, weights, tmp_path):
    """With a LoRA it makes what the merged checkpoint makes; a scale is not compiled in."""
    fingerprint = read_checkpoint(checkpoint).fingerprint
    save_lora(tmp_path / "lora", weights, CONFIG, fingerprint)
    kwargs = dict(mesh=make_mesh("data=1", jax.devices()[:1]), dtype="float32", batch_size=2)
    pipe = Kandinsky3Pipeline.from_pretrained(checkpoint, **kwargs)
    plain = make(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.load_lora(tmp_path / "lora", scale=0.0)
    programs = denoise_program._cache_size()
    np.testing.assert_array_equal(make(pipe), plain)
    pipe.load_lora(tmp_path / "lora", scale=0.5)
    with_lora = make(pipe)
    assert denoise_program._cache_size() == programs + 1
    pipe.unload_lora()
    np.testing.assert_array_equal(make(pipe), plain)

    merged_checkpoint(checkpoint, tmp_path / "lora", tmp_path / "merged", scale=0.5)
    found = read_checkpoint(tmp_path / "merged")
    assert found.source["lora"] == {"base_fingerprint": fingerprint, "scale": 0.5}
    assert found.component_paths["movq"] == checkpoint / "movq"
    merged = make(Kandinsky3Pipeline.from_pretrained(tmp_path / "merged", **kwargs))
    assert relative_error(merged, with_lora) < 1e-5
    assert relative_error(plain, with_lora) > 0.01

    with pytest.raises(ValueError, match="scale is nan; it must be a finite number"):
        pipe.load_lora(tmp_path / "lora", scale=float("nan"))
    save_lora(tmp_path / "other", weights, CONFIG, f"sha256:{0:064}")
    with pytest.warns(UserWarning, match="was trained on another checkpoint"):
        pipe.load_lora(tmp_path / "other")
