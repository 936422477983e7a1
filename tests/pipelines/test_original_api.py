# SPDX-License-Identifier: Apache-2.0
"""The README of the original repository with one changed import."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch
from PIL import Image

from k3jax.checkpoints.format import read_checkpoint
from k3jax.config import SamplerConfig
from k3jax.convert import from_torch
from k3jax.pipelines import original as original_api
from k3jax.pipelines import text_to_image as pipeline
from k3jax.pipelines.inpaint import Kandinsky3InpaintPipeline
from k3jax.pipelines.original import OriginalInpainting, prepare_mask

import torch_checkpoints
from pictures import picture
from random_checkpoint import write_random_checkpoint


MADE = np.zeros((64, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "checkpoint"
    write_random_checkpoint(folder)
    return folder


@pytest.fixture
def published(monkeypatch, weights):
    """The published weights, that were converted already."""
    asked = []

    def converted(variant, cache_dir, paths):
        asked.append((variant, cache_dir, paths))
        return weights

    monkeypatch.setattr(original_api, "_converted", converted)
    return asked


@pytest.mark.slow
def test_the_readme_of_the_original(published, capfd):
    from k3jax import get_T2I_pipeline

    device_map = torch.device("cuda:0")
    dtype_map = {
        "unet": torch.float32,
        "text_encoder": torch.float16,
        "movq": torch.float32,
    }
    t2i_pipe = get_T2I_pipeline(
        device_map,
        dtype_map,
    )
    res = t2i_pipe("A cute corgi lives in a house made out of sushi.", steps=2)
    assert res[0].size == (128, 128)
    assert published == [("base", None, (None, None, None))]
    pipe = t2i_pipe.pipe
    assert pipe.unet.dtype == pipe.movq.dtype == np.float32
    assert str(np.dtype(pipe.text_encoder.dtype)) == "bfloat16"
    assert pipe.mesh.devices.ravel().tolist() == jax.devices()[:1]
    # Every call draws a seed of its own, unless one is given.
    again = [np.asarray(t2i_pipe("a", steps=2)[0]) for _ in range(2)]
    assert (again[0] != again[1]).any()
    call = dict(width=64, height=128, steps=2, guidance_scale=2)
    three = t2i_pipe("a", negative_text="b", images_num=3, bs=2, seed=7, **call)
    assert len(three) == 3 and three[0].size == (64, 128) and pipe.batch_size == 1
    (last,) = t2i_pipe("a", negative_text="b", images_num=1, bs=2, seed=9, **call)
    assert np.abs(np.asarray(last).astype(int) - np.asarray(three[2])).max() <= 1


def test_inpainting_and_flash(published):
    from k3jax import get_inpainting_pipeline, get_T2I_Flash_pipeline

    inp_pipe = get_inpainting_pipeline("cpu", "float32", cache_dir="somewhere")
    mask = np.zeros((64, 64))
    mask[:32] = 1  # Set 1 where image should be masked
    image = Image.fromarray(picture(0))
    (made,) = inp_pipe("A cute corgi.", image, mask, steps=2, guidance_weight_text=3, seed=1)
    assert np.array_equal(np.asarray(made)[44:], picture(0)[44:])
    assert isinstance(inp_pipe, OriginalInpainting)
    assert isinstance(inp_pipe.pipe, Kandinsky3InpaintPipeline)

    flash = get_T2I_Flash_pipeline({"unet": "cuda:1"}, "float32")
    assert flash.pipe.mesh.devices.ravel().tolist() == jax.devices()[1:2]
    assert [asked[0] for asked in published] == ["inpainting", "flash"]
    assert published[0][1] == "somewhere"


def test_the_files_of_the_original(tmp_path, monkeypatch):
    """Converted at the first call, found at the second."""
    torch_checkpoints.write_original(tmp_path / "source")
    real, calls = from_torch.convert, []

    def convert(*args, **kwargs):
        calls.append(kwargs["variant"])
        return real(*args, architecture=torch_checkpoints.ARCHITECTURE, progress=False, **kwargs)

    monkeypatch.setattr(from_torch, "convert", convert)
    found = {path.name: path for path in (tmp_path / "source").rglob("*")}
    paths = [str(found[n]) for n in ("kandinsky3.pt", "flan_ul2_encoder", "movq.pt")]
    make = functools.partial(original_api._converted, "base", str(tmp_path / "cache"))
    folder = make(tuple(paths))
    assert folder.parent == tmp_path / "cache" and calls == ["base"]
    assert read_checkpoint(folder).config.unet.in_channels == 4
    assert make(tuple(paths)) == folder and calls == ["base"]
    with pytest.raises(ValueError, match="give unet_path, text_encoder_path and movq_path togeth"):
        make((paths[0], None, None))
    with pytest.raises(ValueError, match="there is nothing at none"):
        make((paths[0], paths[1], "none"))


def test_the_published_repository_is_converted_once(tmp_path, monkeypatch, weights):
    """The variants share the text encoder of the one that came first."""
    calls = []

    def convert(source, destination, *, variant, text_encoder_from=None):
        calls.append((source, variant, text_encoder_from))
        write_random_checkpoint(destination)

    monkeypatch.setattr(from_torch, "convert", convert)
    nothing = (None, None, None)
    first = original_api._converted("flash", str(tmp_path), nothing)
    original_api._converted("inpainting", str(tmp_path), nothing)
    assert original_api._converted("flash", str(tmp_path), nothing) == first
    assert calls == [
        ("ai-forever/Kandinsky3.1", "flash", None),
        ("ai-forever/Kandinsky3.1", "inpainting", first),
    ]


def test_a_mask_is_widened_by_6_pixels():
    mask = np.zeros((40, 40))
    mask[20, 20] = 1
    expected = np.zeros((40, 40), int)
    expected[14:27, 14:27] = 1
    for form in (mask, mask.astype(np.uint8) * 255, Image.fromarray(mask > 0)):
        assert np.array_equal(prepare_mask(form), expected)


def test_flash_passes_over_steps(published, monkeypatch, strict):
    """The original's default of 50 is nothing that a person has asked for."""
    flash = original_api.get_T2I_Flash_pipeline("cpu", "float32")
    sampler = SamplerConfig("flash", num_inference_steps=4)
    flash.pipe.config = dataclasses.replace(flash.pipe.config, sampler=sampler)
    seen = []
    monkeypatch.setattr(
        pipeline, "make_images", lambda pipe, groups, *rest: seen.append(groups) or {0: MADE}
    )
    flash("A cute corgi.", width=64, height=64, seed=1)
    assert seen[0][0].sampler.num_steps == 4


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(load_in_8bit=True), "text encoders of 8 or 4 bits are not supported"),
        (dict(device_map="cuda:9"), "device_map is cuda:9, but JAX sees 8 devices"),
        (dict(dtype_map=torch.float64), "is 'float64'; it must be bfloat16 or float32"),
    ],
)
def test_bad_arguments(weights, kwargs, message):
    arguments = dict(device_map="cpu", checkpoint=weights) | kwargs
    for function in ("get_T2I_pipeline", "get_T2I_Flash_pipeline", "get_inpainting_pipeline"):
        with pytest.raises(ValueError, match=message):
            getattr(original_api, function)(**arguments)


def test_bad_numbers(weights):
    pipe = original_api.get_T2I_pipeline("cpu", checkpoint=weights)
    for kwargs in (dict(bs=0), dict(images_num=0)):
        with pytest.raises(ValueError, match="it must be 1 or more"):
            pipe("a", **kwargs)
    assert dataclasses.asdict(pipe.pipe.config)["sample_size"] == 128
