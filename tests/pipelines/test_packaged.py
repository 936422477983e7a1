# SPDX-License-Identifier: Apache-2.0
"""The small model that comes with k3jax: it draws what it is told, here and in diffusers."""

import json

import jax
import numpy as np
import pytest
from diffusers import Kandinsky3Pipeline as TorchPipeline

from k3jax import Kandinsky3Pipeline
from k3jax.checkpoints.format import PACKAGED, WEIGHTS, read_checkpoint
from k3jax.checkpoints.manifest import files_below
from k3jax.checkpoints.restore import verify
from k3jax.cli.run_config import architecture_differences, build, collect
from k3jax.convert.to_torch import export
from k3jax.sharding import make_mesh
from k3jax.training.scene_evaluation import judge, reconstruction, shares, unseen_captions

import tiny


MOST_BYTES = 25e6


@pytest.fixture(scope="module")
def pipe():
    one = make_mesh("data=1", jax.devices()[:1])
    return Kandinsky3Pipeline.from_pretrained("tiny", mesh=one, dtype="float32", batch_size=8)


def test_the_files():
    assert sum(path.stat().st_size for path in files_below(WEIGHTS)) <= MOST_BYTES
    for name in PACKAGED:
        assert not verify(WEIGHTS / name) and not verify(name)
        assert read_checkpoint(name).path == read_checkpoint(WEIGHTS / name).path
    checkpoint = read_checkpoint("tiny")
    assert architecture_differences(checkpoint.config, build(collect("tiny")).model) is None
    assert checkpoint.source["layout"] == "k3jax train"


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    with pytest.raises(ValueError, match="is not a k3jax checkpoint"):
        read_checkpoint("tiny")


@pytest.mark.slow
def test_it_draws_what_it_is_told(pipe):
    """As far as it is trained; `test_the_numbers_of_the_readme` looks at more."""
    told = shares(list(judge(pipe, 16)))
    assert told["color_on_shape"] >= 0.7, told
    assert told["background"] >= 0.95, told
    untold = shares(list(judge(pipe, 8, without_text=True)))
    assert untold["color_on_shape"] <= 0.1, untold


@pytest.mark.slow
def test_the_numbers_of_the_readme(pipe):
    told = shares(list(judge(pipe, 96)))
    print(f"\n{told}")
    assert told["color_on_shape"] >= 0.8
    assert told["objects"] >= 0.75
    assert told["position"] >= 0.85
    assert told["relation"] >= 0.7
    assert told["background"] >= 0.97
    untold = shares(list(judge(pipe, 32, without_text=True)))
    print(f"empty prompts: {untold}")
    for question in ("color_on_shape", "objects", "background", "position", "relation"):
        assert untold[question] < told[question]
    decibel, rebuilt = reconstruction(pipe)
    print(f"rebuilt: {decibel:.1f} dB, {rebuilt}")
    assert decibel >= 31
    assert rebuilt["color_on_shape"] >= 0.88 and rebuilt["objects"] >= 0.88


def test_the_same_picture_in_diffusers(pipe, tmp_path, monkeypatch):
    steps, size = pipe.config.sampler.num_inference_steps, pipe.config.sample_size
    prompts = [caption for _, caption in unseen_captions(1)]
    rng = np.random.default_rng(0)
    shape = (len(prompts), size // 8, size // 8, 4)
    latents = rng.standard_normal(shape, np.float32)
    step_noise = rng.standard_normal((steps, *shape), np.float32)
    ours = pipe(
        prompts, latents=latents, step_noise=step_noise, output_type="np", progress_bar=False
    ).images

    export("tiny", tmp_path / "torch", progress=False)
    index = json.loads((tmp_path / "torch" / "model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]
    theirs = TorchPipeline.from_pretrained(tmp_path / "torch")
    theirs.to("cpu").set_progress_bar_config(disable=True)
    for component in (theirs.unet, theirs.movq, theirs.text_encoder):
        component.float()
    for i, prompt in enumerate(prompts):
        draws = iter(step_noise[:, i : i + 1])
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor",
            lambda *args, draws=draws, **kwargs: tiny.nchw(next(draws)),
        )
        image = theirs(
            prompt,
            num_inference_steps=steps,
            guidance_scale=pipe.config.sampler.guidance_scale,
            height=size,
            width=size,
            latents=tiny.nchw(latents[i : i + 1]),
            output_type="np",
        ).images[0]
        assert np.abs(ours[i] - image).max() <= 1 / 255
