# SPDX-License-Identifier: Apache-2.0
"""The whole pipeline against diffusers' Kandinsky3Pipeline, with the same noise."""

import dataclasses
import warnings

import jax
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
)
from diffusers import Kandinsky3Pipeline as TorchPipeline

from k3jax.config import COMPONENTS, MAX_TOKENS
from k3jax.model.tokenizer import PromptTruncatedWarning, Tokenizer
from k3jax.pipelines.text_to_image import Kandinsky3Pipeline
from k3jax.sampling.denoise import denoise_program
from k3jax.sharding import make_mesh

import tiny
from pictures import SCHEDULER
from random_checkpoint import write_random_checkpoint


PROMPTS = ["a cat", "a much longer prompt about two dogs on a hill", ""]
SIZE = 64
LATENTS = (SIZE // 8, SIZE // 8, 4)
STEPS = 6
SCHEDULERS = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "dpm++2m": DPMSolverMultistepScheduler,
}


@pytest.fixture(scope="module")
def text_theirs(theirs):
    """diffusers' text to image."""
    return TorchPipeline(**theirs.components)


@pytest.fixture(scope="module")
def components(base):
    return {name: getattr(base, name) for name in COMPONENTS}


def build(components, tokenizer_folder, mesh="data=1", devices=1, batch_size=None):
    mesh = make_mesh(mesh, jax.devices()[:devices])
    placed = {
        name: jax.device_put(module, tiny.module_shardings(module, mesh))
        for name, module in components.items()
    }
    tokenizer = Tokenizer(tokenizer_folder)
    return Kandinsky3Pipeline(tiny.SHALLOW, tokenizer, placed, mesh, batch_size)


@pytest.fixture(scope="module")
def ours(base):
    return base


def noises(count, steps=STEPS, seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((count, *LATENTS), np.float32),
        rng.standard_normal((steps, count, *LATENTS), np.float32),
    )


def run_theirs(pipe, monkeypatch, prompt, latents, step_noise, sampler="ddpm", **kwargs):
    """One call of diffusers with the noise given; float32 images b h w c in [0, 1]."""
    pipe.scheduler = SCHEDULERS[sampler](**SCHEDULER)
    draws = iter(step_noise)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor",
        lambda *args, **kwargs: tiny.nchw(next(draws)),
    )
    images = pipe(
        prompt,
        num_inference_steps=STEPS,
        height=SIZE,
        width=SIZE,
        latents=tiny.nchw(latents),
        output_type="np",
        **kwargs,
    ).images
    return np.asarray(images)


def run_ours(pipe, prompt=PROMPTS, **kwargs):
    kwargs = dict(height=SIZE, width=SIZE, num_inference_steps=STEPS, sampler="ddpm") | kwargs
    kwargs = dict(output_type="np", progress_bar=False) | kwargs
    return np.asarray(pipe(prompt, **kwargs).images)


@pytest.mark.parametrize(
    "sampler",
    [
        "ddpm",
        pytest.param("ddim", marks=pytest.mark.slow),
        pytest.param("dpm++2m", marks=pytest.mark.slow),
    ],
)
def test_images_are_those_of_diffusers(ours, text_theirs, monkeypatch, sampler):
    """Several prompts of different lengths and several images each, in one call of ours."""
    latents, step_noise = noises(6)
    got = run_ours(
        ours,
        num_images_per_prompt=2,
        latents=latents,
        step_noise=step_noise,
        sampler=sampler,
        eta=0.0 if sampler == "ddim" else None,
    )
    for number, prompt in enumerate(PROMPTS):
        part = slice(2 * number, 2 * number + 2)
        expected = run_theirs(
            text_theirs,
            monkeypatch,
            prompt,
            latents[part],
            step_noise[:, part],
            sampler,
            num_images_per_prompt=2,
        )
        assert expected.std() > 0.1
        off = np.abs(got[part] - expected)
        print(f"{sampler}: {255 * off.max():.3f}/255, beyond 1/255: {(off > 1 / 255).mean():.1e}")
        # It does not clip the image that it predicts: of random weights that is far out of range,
        # and on some CPUs a few pixels round further apart than 1/255.
        assert off.max() <= (3 if sampler == "dpm++2m" else 1) / 255
        assert (off > 1 / 255).mean() < 1e-3


def test_negative_prompts(ours, text_theirs, monkeypatch):
    latents, step_noise = noises(2, seed=1)
    negatives = ["bad", "two hills and a dog"]
    got = run_ours(
        ours, PROMPTS[:2], negative_prompt=negatives, latents=latents, step_noise=step_noise
    )
    for i in range(2):
        expected = run_theirs(
            text_theirs,
            monkeypatch,
            PROMPTS[i],
            latents[i : i + 1],
            step_noise[:, i : i + 1],
            negative_prompt=negatives[i],
        )
        assert np.abs(got[i : i + 1] - expected).max() <= 1 / 255


def test_one_negative_for_all_and_some_without(ours):
    """diffusers wants a list for a list."""
    one = run_ours(ours, PROMPTS[:2], negative_prompt="bad")
    each = run_ours(ours, PROMPTS[:2], negative_prompt=["bad", None])
    none = run_ours(ours, PROMPTS[:2])
    assert np.array_equal(one[0], each[0])
    assert np.array_equal(none[1], each[1])
    assert not np.array_equal(one[1], none[1])


# --- what diffusers does wrong, and we do not ---------------------------------------------------


def run_halves(pipe, monkeypatch, prompt, negative, latents, step_noise, guidance_scale=3.0):
    """diffusers' U-Net and scheduler, each half of the guidance through its own full window."""
    window = len(pipe.tokenizer(prompt)["input_ids"]) + 1
    halves = []
    for text in (prompt, negative):
        tokens = pipe.tokenizer(
            text, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt"
        )
        mask = tokens.attention_mask
        with torch.no_grad():
            embeds = pipe.text_encoder(tokens.input_ids, attention_mask=mask)[0] * mask[..., None]
        window = max(window, int(mask.sum()) + 1)
        halves.append((embeds[:, :window], mask[:, :window]))
    draws = iter(step_noise)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor",
        lambda *args, **kwargs: tiny.nchw(next(draws)),
    )
    scheduler = DDPMScheduler(**SCHEDULER)
    scheduler.set_timesteps(len(step_noise))
    x = tiny.nchw(latents)
    with torch.no_grad():
        for t in scheduler.timesteps:
            cond, uncond = (
                pipe.unet(x, t, encoder_hidden_states=e, encoder_attention_mask=m).sample
                for e, m in halves
            )
            guided = (guidance_scale + 1) * cond - guidance_scale * uncond
            x = scheduler.step(guided, t, x).prev_sample
        images = pipe.movq.decode(x, force_not_quantize=True).sample
    return tiny.nhwc((images * 0.5 + 0.5).clamp(0, 1))


def test_a_long_negative_is_not_cut_to_the_prompt(ours, text_theirs, monkeypatch):
    """diffusers slices the negative to the prompt's window, its end-of-sequence with the rest."""
    latents, step_noise = noises(1, seed=2)
    texts = ("a cat", "ugly, old and grey, and broken too")
    got = run_ours(ours, texts[0], negative_prompt=texts[1], latents=latents, step_noise=step_noise)
    whole = run_halves(text_theirs, monkeypatch, *texts, latents, step_noise)
    assert np.abs(got - whole).max() <= 1 / 255
    cut = run_theirs(
        text_theirs, monkeypatch, texts[0], latents, step_noise, negative_prompt=texts[1]
    )
    assert np.abs(cut - whole).max() > 2 / 255


def test_neighbours_do_not_change_an_image(ours, text_theirs, monkeypatch):
    """diffusers widens the window of a short prompt to that of the longest in the batch."""
    latents, step_noise = noises(2, seed=3)
    together = run_theirs(text_theirs, monkeypatch, PROMPTS[:2], latents, step_noise)
    alone = run_theirs(text_theirs, monkeypatch, PROMPTS[0], latents[:1], step_noise[:, :1])
    assert np.abs(together[:1] - alone).max() > 2 / 255
    got = run_ours(ours, PROMPTS[:2], latents=latents, step_noise=step_noise)
    assert np.abs(got[:1] - alone).max() <= 1 / 255


def test_several_images_of_several_prompts_keep_their_masks(ours, text_theirs, monkeypatch):
    """diffusers repeats embeddings as p0 p0 p1 p1 but masks as m0 m1 m0 m1."""
    embeds, _, mask, _ = text_theirs.encode_prompt(
        PROMPTS[:2], False, num_images_per_prompt=2, _cut_context=True
    )
    tokens = (embeds.abs().sum(-1) > 0).sum(1)
    assert tokens.tolist() != mask.sum(1).tolist()
    latents, step_noise = noises(4, seed=4)
    got = run_ours(
        ours, PROMPTS[:2], num_images_per_prompt=2, latents=latents, step_noise=step_noise
    )
    expected = run_theirs(text_theirs, monkeypatch, PROMPTS[1], latents[2:3], step_noise[:, 2:3])
    assert np.abs(got[2:3] - expected).max() <= 1 / 255


@pytest.mark.slow
def test_a_size_that_cannot_be_is_refused(ours, text_theirs, monkeypatch):
    """diffusers rounds up and returns a larger image than was asked for."""
    kwargs = dict(num_inference_steps=2, width=64, output_type="np")
    text_theirs.scheduler = DDPMScheduler(**SCHEDULER)
    larger = text_theirs("a cat", height=70, **kwargs).images
    assert larger.shape == (1, 128, 64, 3)
    with pytest.raises(ValueError, match=r"height is 70; .* multiple of 16 \(the nearest is 64\)"):
        ours("a cat", height=70, **kwargs)


def test_guidance_formula_holds_at_every_scale(ours, text_theirs, monkeypatch):
    """diffusers turns guidance off at 1 and below; the formula at 1 is 2c - u."""
    latents, step_noise = noises(1, seed=5)
    kwargs = dict(latents=latents, step_noise=step_noise)
    off = run_ours(ours, "a cat", guidance_scale=0.0, **kwargs)
    reference = run_theirs(
        text_theirs, monkeypatch, "a cat", latents, step_noise, guidance_scale=1.0
    )
    assert np.abs(off - reference).max() <= 1 / 255
    one = run_ours(ours, "a cat", guidance_scale=1.0, **kwargs)
    assert np.abs(one - reference).max() > 2 / 255
    nearly = run_theirs(
        text_theirs, monkeypatch, "a cat", latents, step_noise, guidance_scale=1.0 + 1e-6
    )
    assert np.abs(one - nearly).max() <= 1 / 255


# --- what an image depends on -------------------------------------------------------------------


@pytest.fixture(scope="module")
def seven(ours):
    return run_ours(ours, "a cat", num_images_per_prompt=7, seed=40)


def test_an_image_alone_is_the_image_in_a_batch(ours, seven):
    """Same per-device batch: bit for bit."""
    for k in (0, 3, 6):
        assert np.array_equal(seven[k : k + 1], run_ours(ours, "a cat", seed=40 + k))
    mixed = run_ours(ours, [PROMPTS[1], "a cat", PROMPTS[2]], seed=[1, 43, 2])
    assert np.array_equal(mixed[1], seven[3])


def test_a_wider_batch_changes_nothing_visible(components, tokenizer_folder, seven):
    wide = build(components, tokenizer_folder, batch_size=2)
    got = run_ours(wide, "a cat", num_images_per_prompt=7, seed=40)
    assert np.abs(got - seven).max() <= 1 / 255


@pytest.mark.parametrize(
    "mesh, devices",
    [
        ("data=2", 2),
        pytest.param("data=8", 8, marks=pytest.mark.slow),
        pytest.param("data=2,tensor=2", 4, marks=pytest.mark.slow),
        pytest.param("fsdp=4,tensor=2", 8, marks=pytest.mark.slow),
    ],
)
def test_meshes(components, tokenizer_folder, seven, mesh, devices):
    pipe = build(components, tokenizer_folder, mesh, devices)
    assert pipe.batch_size == devices // pipe.mesh.shape["tensor"]
    compiled = denoise_program._cache_size()
    got = run_ours(pipe, "a cat", num_images_per_prompt=7, seed=40)
    assert denoise_program._cache_size() <= compiled + 1  # 0 where another test compiled it
    assert got.shape == seven.shape
    if pipe.mesh.shape["tensor"] == 1 and pipe.mesh.shape["fsdp"] == 1:
        assert np.array_equal(got, seven)
    assert np.abs(got - seven).max() <= 1 / 255


def test_the_encoder_has_a_mesh_of_its_own(tmp_path):
    """Split over all devices, where each has a U-Net of its own."""
    write_random_checkpoint(tmp_path / "demo")
    meshes = dict(mesh="data=-1", encoder_mesh="tensor=-1")
    pipe = Kandinsky3Pipeline.from_pretrained(tmp_path / "demo", dtype="float32", **meshes)
    whole = Kandinsky3Pipeline.from_pretrained(tmp_path / "demo", dtype="float32")

    def share(weight):
        value = weight.get_value()
        return value.addressable_shards[0].data.size / value.size

    assert share(pipe.text_encoder.layers.mlp.wi_0.kernel) == 1 / 8
    assert share(pipe.unet.conv_in.kernel) == 1
    assert pipe.batch_size == 8
    for made in (pipe, Kandinsky3Pipeline.from_pipe(pipe)):
        found, expected = (p.encode_prompt(PROMPTS).embeds for p in (made, whole))
        assert tiny.relative_error(found, expected) < 1e-5
    with pytest.raises(ValueError, match="the mesh splits a batch over 8"):
        Kandinsky3Pipeline.from_pretrained(
            tmp_path / "demo", mesh="tensor=-1", encoder_mesh="data=-1", components=()
        )


def test_remainders_do_not_compile_again(components, tokenizer_folder):
    pipe = build(components, tokenizer_folder, batch_size=2)
    run_ours(pipe, "a cat", num_images_per_prompt=2)
    compiled = denoise_program._cache_size()
    for count in (1, 3, 5):
        run_ours(pipe, "a dog", num_images_per_prompt=count, guidance_scale=2.0, seed=9)
    assert denoise_program._cache_size() == compiled


def test_embeddings_can_be_passed_back(ours):
    embeds = ours.encode_prompt(PROMPTS)
    assert isinstance(embeds.embeds, np.ndarray) and embeds.embeds.shape[:2] == (3, MAX_TOKENS)
    assert embeds.lengths.tolist() == [7, 47, 2]
    direct = run_ours(ours, PROMPTS, negative_prompt="bad")
    negative = ours.encode_prompt(["bad"] * 3)
    again = run_ours(ours, None, prompt_embeds=embeds, negative_prompt_embeds=negative)
    assert np.array_equal(direct, again)


def test_output_types(ours, caplog):
    """At the first call, the decoder is compiled while the loop is."""
    size = dict(height=128, num_inference_steps=2)
    jax.config.update("jax_log_compiles", True)
    try:
        pil = ours("a cat", width=64, sampler="ddpm", progress_bar=False, **size).images
    finally:
        jax.config.update("jax_log_compiles", False)
    compiled = [r for r in caplog.records if "XLA compilation of jit(decode_lat" in r.getMessage()]
    assert len(compiled) == 1 and compiled[0].threadName != "MainThread"
    assert [image.size for image in pil] == [(64, 128)]
    arrays = run_ours(ours, "a cat", **size)
    assert np.array_equal(np.asarray(pil[0]), np.round(arrays[0] * 255).astype(np.uint8))
    latents = run_ours(ours, "a cat", output_type="latent", **size)
    assert latents.shape == (1, 16, 8, 4)
    assert np.array_equal(ours.decode(latents, "np").images, arrays)


def test_guidance_interval(ours):
    everywhere = run_ours(ours, "a cat", guidance_interval=(0, STEPS - 1))
    assert np.abs(everywhere - run_ours(ours, "a cat")).max() <= 1 / 255
    floats = run_ours(ours, "a cat", guidance_interval=[0.0, np.int64(STEPS - 1)])
    assert np.array_equal(floats, everywhere)
    part = run_ours(ours, "a cat", guidance_interval=(1, 3))
    assert np.abs(part - everywhere).max() > 2 / 255


def test_float32_means_float32(ours, monkeypatch):
    """On TPUs and GPUs the default multiplies float32 in fewer bits."""
    from k3jax.pipelines import generation, pipeline, streaming

    seen = []

    def spy(module, name):
        program = getattr(module, name)

        def call(*args, **kwargs):
            seen.append((name, jax.config.jax_default_matmul_precision))
            return program(*args, **kwargs)

        call.lower = program.lower
        monkeypatch.setattr(module, name, call)

    spy(streaming, "encode_text")
    spy(pipeline, "decode_latents")
    for name in ("make_contexts", "denoise_program"):
        spy(generation, name)
    with jax.default_matmul_precision("default"):
        run_ours(ours, "a cat")
    assert len({name for name, _ in seen}) == 4
    assert {precision for _, precision in seen} == {"highest"}


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(embeds=np.nan), "prompt_embeds.embeds holds .* not finite"),
        (dict(token_weights=np.inf), "prompt_embeds.token_weights holds .* not finite"),
        (dict(token_weights=-1), "prompt_embeds.token_weights holds -1.0; all must be 0 or more"),
        (dict(lengths=0), "prompt_embeds.lengths must be between 1 and 128"),
    ],
)
@pytest.mark.parametrize("kind", ["", "negative_"])
def test_embeddings_that_cannot_be(ours, change, message, kind):
    good = ours.encode_prompt("a cat", word_weights=True)
    ((field, value),) = change.items()
    changed = {field: np.full_like(getattr(good, field), value)}
    embeds = {"prompt_embeds": good, f"{kind}prompt_embeds": dataclasses.replace(good, **changed)}
    with pytest.raises(ValueError, match=f"^{kind}{message}"):
        run_ours(ours, None, **embeds)


def test_bad_mesh_and_batch(components, tokenizer_folder):
    with pytest.raises(ValueError, match="'model=2' is not AXIS=SIZE"):
        make_mesh("model=2")
    with pytest.raises(ValueError, match="takes 3 devices or a multiple, but there are 8"):
        make_mesh("data=-1,tensor=3")
    with pytest.raises(ValueError, match="batch_size is 3, but the mesh splits a batch over 2"):
        build(components, tokenizer_folder, "data=2", 2, batch_size=3)
    for size in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"batch_size is {size}; it must be"):
            build(components, tokenizer_folder, "data=1", 1, batch_size=size)
    pipe = build(components, tokenizer_folder, "data=1", 1, batch_size=2.0)
    assert pipe.batch_size == 2
    with pytest.raises(ValueError, match="batch_size is 0; it must be 1 or more"):
        pipe.batch_size = 0


def test_a_long_prompt_is_truncated_with_a_warning(ours, text_theirs):
    long = "word " * 2000
    with pytest.warns(PromptTruncatedWarning, match="10001 tokens and the model sees 128; cut off"):
        embeds = ours.encode_prompt(long)
    assert embeds.lengths.tolist() == [MAX_TOKENS]
    with torch.no_grad():
        expected = text_theirs.encode_prompt(long, False)[0].numpy()
    assert tiny.relative_error(embeds.embeds, expected) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.encode_prompt("word " * 25)


def test_an_inpainting_checkpoint_is_refused(ours):
    unet = dataclasses.replace(tiny.SHALLOW_UNET, in_channels=9)
    config = dataclasses.replace(tiny.SHALLOW, unet=unet)
    components = dict.fromkeys(("text_encoder", "text_projection", "unet", "movq"))
    with pytest.raises(ValueError, match=r"inpainting checkpoint .* 9 channels, not 4"):
        Kandinsky3Pipeline(config, ours.tokenizer, components, ours.mesh)
