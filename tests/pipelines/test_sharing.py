# SPDX-License-Identifier: Apache-2.0
"""Pipelines that share components: nothing is in memory twice."""

import dataclasses
import gc
import tempfile
import warnings

import jax
import numpy as np
import pytest

from k3jax import (
    Kandinsky3Img2ImgPipeline,
    Kandinsky3InpaintPipeline,
    Kandinsky3Pipeline,
)
from k3jax.checkpoints.lora_files import save_lora
from k3jax.checkpoints.restore import save_module
from k3jax.checkpoints.writer import CheckpointWriter
from k3jax.config import COMPONENTS, LoraConfig
from k3jax.model.abstract import abstract_module
from k3jax.pipelines.adapters import Adapters
from k3jax.pipelines.loading import _dtypes_of
from k3jax.sharding import make_mesh
from k3jax.training.tasks.lora_finetuning import init_lora

from pictures import picture
from random_checkpoint import (
    MODEL,
    random_module,
    write_byte_tokenizer,
    write_random_checkpoint,
)


ONE = make_mesh("data=1", jax.devices()[:1])
SMALL = dict(num_inference_steps=2, output_type="np", progress_bar=False)


def held() -> int:
    """Bytes of all arrays on the devices."""
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def size_of(module) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(module))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A base checkpoint, and one of inpainting that points at its encoder and has its MoVQ too."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_random_checkpoint(folder / "base")
    unet = dataclasses.replace(MODEL.unet, in_channels=9)
    config = dataclasses.replace(MODEL, unet=unet)
    rng = np.random.default_rng(1)
    with (
        tempfile.TemporaryDirectory() as tokenizer,
        CheckpointWriter(folder / "inpainting") as writer,
    ):
        write_byte_tokenizer(tokenizer)
        writer.add_tokenizer(tokenizer)
        writer.share("text_encoder", folder / "base")
        for name in ("text_projection", "unet"):
            save_module(writer, name, random_module(name, config, rng))
        movq = random_module(
            "movq", MODEL, np.random.default_rng([0, list(COMPONENTS).index("movq")])
        )
        save_module(writer, "movq", movq)
        writer.commit(config, source={"layout": "random"}, dtype="float32")
    return folder / "base", folder / "inpainting"


@pytest.fixture
def pipe(checkpoints):
    return Kandinsky3Pipeline.from_pretrained(checkpoints[0], mesh=ONE, dtype="float32")


def test_pipelines_of_one_checkpoint_are_the_same_modules(pipe):
    before = held()
    for kind in (Kandinsky3Img2ImgPipeline, Kandinsky3InpaintPipeline):
        other = kind.from_pipe(pipe)
        assert all(getattr(other, name) is getattr(pipe, name) for name in COMPONENTS)
        assert other.tokenizer is pipe.tokenizer and other.mesh is pipe.mesh
        assert other.fingerprint == pipe.fingerprint and other.batch_size == pipe.batch_size
    assert held() == before


def test_of_another_checkpoint_only_what_differs_is_loaded(pipe, checkpoints):
    """The encoder by reference, MoVQ because its weights are equal."""
    before = held()
    other = Kandinsky3InpaintPipeline.from_pipe(pipe, checkpoints[1])
    assert other.method == "model"
    assert other.text_encoder is pipe.text_encoder and other.movq is pipe.movq
    new = size_of(other.unet) + size_of(other.text_projection)
    assert before + new <= held() < before + 1.01 * new
    assert other.unet.dtype == pipe.unet.dtype and other.tokenizer is pipe.tokenizer
    mask = np.zeros((64, 64))
    mask[:32] = 1
    shared = other("a", picture(0), mask, **SMALL).images
    alone = Kandinsky3InpaintPipeline.from_pretrained(
        checkpoints[1], mesh=pipe.mesh, dtype="float32"
    )
    assert np.array_equal(alone("a", picture(0), mask, **SMALL).images, shared)


def test_components_are_swapped_without_a_second_copy(pipe, checkpoints, monkeypatch):
    """`release` frees the old U-Net before the new one is read."""
    from k3jax.pipelines import loading

    most, restore = [], loading.restore

    def watched(checkpoint, name, **kwargs):
        most.append(held())
        return restore(checkpoint, name, **kwargs)

    monkeypatch.setattr(loading, "restore", watched)
    before, old = held(), size_of(pipe.unet) + size_of(pipe.text_projection)
    other = Kandinsky3InpaintPipeline.from_pipe(pipe, checkpoints[1], release=True)
    assert most[0] == before - old
    assert held() < 1.01 * before and pipe.unet is None
    with pytest.raises(ValueError, match="this pipeline lacks a component that this takes"):
        pipe("a", height=64, width=64, **SMALL)
    assert other.unet is not None and pipe.movq is other.movq


def test_what_cannot_be_shared(pipe, checkpoints):
    with pytest.raises(ValueError, match=r"inpainting checkpoint .* image to image needs a base"):
        Kandinsky3Img2ImgPipeline.from_pipe(pipe, checkpoints[1])
    with pytest.raises(ValueError, match="There is no checkpoint at"):
        Kandinsky3InpaintPipeline.from_pipe(pipe, checkpoints[1] / "none")


def test_a_dtype_for_each_component(checkpoints):
    pipe = Kandinsky3Pipeline.from_pretrained(
        checkpoints[0], mesh=ONE, dtype={"movq": "float32", "text_encoder": "float32"}
    )
    found = {name: str(np.dtype(getattr(pipe, name).dtype)) for name in COMPONENTS}
    assert found == {
        "text_encoder": "float32",
        "text_projection": "float32",
        "unet": "bfloat16",
        "movq": "float32",
    }


def test_the_text_encoder_apart(pipe, checkpoints):
    load = dict(mesh=ONE, dtype="float32")
    encoder = Kandinsky3Pipeline.from_pretrained(
        checkpoints[0], components=["text_encoder"], **load
    )
    assert encoder.unet is None and encoder.movq is None and encoder.text_projection is None
    others = [name for name in COMPONENTS if name != "text_encoder"]
    rest = Kandinsky3Pipeline.from_pretrained(checkpoints[0], components=others, **load)
    assert rest.text_encoder is None
    call = dict(height=64, width=64, num_inference_steps=2, progress_bar=False)
    embeds = encoder.encode_prompt("a cat"), encoder.encode_prompt("blue")
    (apart,) = rest(prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], **call).images
    (whole,) = pipe("a cat", negative_prompt="blue", **call).images
    np.testing.assert_array_equal(np.asarray(apart), np.asarray(whole))
    with pytest.raises(ValueError, match="lacks a component"):
        rest("a cat", **call)


@pytest.mark.parametrize("kind", ["lora", "int8", "dtypes"])
def test_another_checkpoint_has_the_dtypes_of_the_base_weights(checkpoints, tmp_path, kind):
    """Not those of a LoRA's factors, nor of int8 scales."""
    dtype = "float32" if kind == "int8" else {"movq": "float32"}
    load = dict(mesh=ONE, dtype=dtype, int8_text_encoder=kind == "int8")
    pipe = Kandinsky3Pipeline.from_pretrained(checkpoints[0], **load)
    assert _dtypes_of(pipe.text_encoder)[1] == ("float32" if kind == "int8" else "bfloat16")
    if kind == "lora":
        config = LoraConfig(rank=2)
        weights = init_lora(abstract_module("unet", MODEL), config)
        save_lora(tmp_path / "lora", weights, config, pipe.fingerprint)
        pipe.load_lora(tmp_path / "lora")
        assert jax.tree.leaves(pipe.unet)[0].dtype == "float32"  # of the LoRA
    other = Kandinsky3InpaintPipeline.from_pipe(pipe, checkpoints[1])
    for name in ("unet", "text_projection"):
        module = getattr(other, name)
        expected = "float32" if kind == "int8" else "bfloat16"
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(module)} == {expected}
        assert module.dtype == expected


def test_a_component_that_is_not_there_has_no_dtype(checkpoints):
    load = dict(mesh=ONE, components=["text_encoder", "movq"])
    pipe = Kandinsky3Pipeline.from_pretrained(checkpoints[0], **load)
    with pytest.raises(ValueError, match=r"component that this pipeline lacks .* from_pretrained"):
        Kandinsky3InpaintPipeline.from_pipe(pipe, checkpoints[1])


def test_a_lora_stays_with_its_unet(pipe, checkpoints):
    pipe._adapters = Adapters(pipe.unet, {})
    other = Kandinsky3Img2ImgPipeline.from_pipe(pipe)
    assert other._adapters is pipe._adapters
    inpaint = Kandinsky3InpaintPipeline.from_pipe(pipe, checkpoints[1])
    assert inpaint._adapters is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.unload_lora()
    assert other.unet is pipe.unet
