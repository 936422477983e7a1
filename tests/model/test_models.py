# SPDX-License-Identifier: Apache-2.0
"""Each network against PyTorch's, in float32 on random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from k3jax.config import MAX_TOKENS, ModelConfig, UNetConfig
from k3jax.model.abstract import abstract_module, parameter_count
from k3jax.model.context import PromptEmbeds

import tiny


TOLERANCE = 1e-5  # of the output's scale


def prompt(rng, lengths, rows=MAX_TOKENS) -> PromptEmbeds:
    """Random embeddings of prompts with these numbers of tokens."""
    tokens = np.asarray(lengths)
    return PromptEmbeds(
        embeds=rng.standard_normal((len(lengths), rows, tiny.PROJECTION.d_model), np.float32),
        attention_mask=np.arange(rows) < tokens[:, None],
        lengths=np.minimum(tokens + 1, rows),
    )


@pytest.mark.parametrize("lengths", [(5, 16, 1)])
def test_text_encoder(lengths):
    theirs = tiny.torch_text_encoder()
    ours = tiny.ours("text_encoder", tiny.CONFIG, theirs.state_dict())
    rng = np.random.default_rng(0)
    ids = rng.integers(2, tiny.VOCAB, (len(lengths), 16))
    mask = np.arange(16) < np.asarray(lengths)[:, None]
    ids = np.where(mask, ids, 0)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask))[0].numpy()
    got = np.asarray(jax.jit(lambda m, *a: m(*a))(ours, ids, mask))
    assert tiny.relative_error(got[mask], expected[mask]) < TOLERANCE


def test_text_encoder_at_full_length():
    """Relative positions in every bucket, as 128 tokens have them."""
    theirs = tiny.torch_text_encoder()
    ours = tiny.ours("text_encoder", tiny.CONFIG, theirs.state_dict())
    ids = np.random.default_rng(1).integers(2, tiny.VOCAB, (1, MAX_TOKENS))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids))[0].numpy()
    assert tiny.relative_error(ours(ids, np.ones_like(ids)), expected) < TOLERANCE


def test_text_encoder_keeps_its_residual_stream_in_float32():
    """bf16 weights and matmuls; a bf16 stream would lose small layers beside a large one."""
    theirs = tiny.torch_text_encoder()
    state = theirs.state_dict()
    state["shared.weight"] *= 300
    module = tiny.ours("text_encoder", tiny.CONFIG, state)
    ids = np.random.default_rng(2).integers(2, tiny.VOCAB, (2, 16))
    mask = np.ones_like(ids)
    wide = module(ids, mask)
    half = in_bfloat16("text_encoder", state)
    jaxpr = str(jax.make_jaxpr(lambda ids: half(ids, mask))(ids))
    assert "bf16[2,16,32] = add" not in jaxpr
    assert half(ids, mask).dtype == jnp.bfloat16
    assert tiny.relative_error(half(ids, mask), wide) < 0.02


def torch_unet_output(theirs, sample, timesteps, embeds, mask, length):
    """diffusers' noise prediction; it cuts the text to the batch's longest window."""
    embeds = embeds * mask[..., None]
    with torch.no_grad():
        return theirs(
            tiny.nchw(sample),
            torch.tensor(timesteps),
            torch.tensor(embeds[:, :length], dtype=torch.float32),
            torch.tensor(mask[:, :length]),
        ).sample.numpy()


def build_unet(config: ModelConfig, theirs):
    state = {k: v for k, v in theirs.state_dict().items() if "encoder_hid_proj" not in k}
    projection = {k: v for k, v in theirs.state_dict().items() if "encoder_hid_proj" in k}
    return (
        tiny.ours("unet", config, state),
        tiny.ours("text_projection", config, projection),
    )


@jax.jit
def call_unet(unet, sample, timesteps, context):
    """Compiled once: all tests give it three samples of one size."""
    return unet(sample, timesteps, context)


def our_unet_output(unet, projection, sample, timesteps, prompt):
    return call_unet(unet, sample, timesteps, projection(prompt, "diffusers"))


@pytest.fixture(scope="module")
def unets():
    theirs = tiny.torch_unet()
    return theirs, *build_unet(tiny.CONFIG, theirs)


def test_unet(unets):
    theirs, unet, projection = unets
    rng = np.random.default_rng(3)
    sample = rng.standard_normal((3, 16, 8, 4), np.float32)
    timesteps = np.array([999.0, 480.0, 1.0], np.float32)
    prompts = prompt(rng, (1, 9, MAX_TOKENS))
    got = our_unet_output(unet, projection, sample, timesteps, prompts)
    for i, length in enumerate(prompts.lengths):
        row = slice(i, i + 1)
        expected = torch_unet_output(
            theirs,
            sample[row],
            timesteps[row],
            prompts.embeds[row],
            prompts.attention_mask[row],
            length,
        )
        assert tiny.relative_error(got[row], tiny.nhwc(expected)) < TOLERANCE


def test_unet_unconditional_is_zero_embeddings_under_an_empty_mask(unets):
    theirs, unet, projection = unets
    rng = np.random.default_rng(4)
    sample = rng.standard_normal((3, 16, 8, 4), np.float32)
    timesteps = np.array([600.0, 20.0, 300.0], np.float32)
    lengths = np.array([7, 7, 7])
    zeros = np.zeros((3, 7, tiny.PROJECTION.d_model), np.float32)
    expected = torch_unet_output(theirs, sample, timesteps, zeros, np.zeros((3, 7)), 7)
    context = projection.unconditional(lengths, MAX_TOKENS, "diffusers")
    got = call_unet(unet, sample, timesteps, context)
    assert tiny.relative_error(got, tiny.nhwc(expected)) < TOLERANCE


def test_a_prompt_does_not_depend_on_its_neighbours(unets):
    """diffusers cuts the whole batch to the longest prompt, which changes the shorter ones."""
    theirs, unet, projection = unets
    rng = np.random.default_rng(5)
    sample = rng.standard_normal((3, 16, 8, 4), np.float32)
    timesteps = np.full(3, 300.0, np.float32)
    prompts = prompt(rng, (3, 40, 9))
    arguments = (theirs, sample, timesteps, prompts.embeds, prompts.attention_mask)
    together = torch_unet_output(*arguments, length=41)
    alone = torch_unet_output(theirs, *(a[:1] for a in arguments[1:]), length=4)
    assert np.abs(together[:1] - alone).max() > 1e-3

    ours_together = our_unet_output(unet, projection, sample, timesteps, prompts)
    assert tiny.relative_error(ours_together[:1], tiny.nhwc(alone)) < TOLERANCE


def test_unet_with_two_levels_has_the_flags_of_the_reference():
    """Below four levels the references misalign the attention flags of the up path."""
    theirs = tiny.torch_unet(tiny.SHALLOW_UNET)
    unet, projection = build_unet(tiny.SHALLOW, theirs)
    assert unet.up_blocks[1].self_attention is not None
    assert unet.down_blocks[0].self_attention is None
    rng = np.random.default_rng(6)
    sample = rng.standard_normal((1, 8, 8, 4), np.float32)
    prompts = prompt(rng, (6,))
    expected = torch_unet_output(
        theirs, sample, [500.0], prompts.embeds, prompts.attention_mask, prompts.lengths[0]
    )
    got = our_unet_output(unet, projection, sample, np.array([500.0]), prompts)
    assert tiny.relative_error(got, tiny.nhwc(expected)) < TOLERANCE


def in_bfloat16(component, state):
    """The module with bfloat16 weights and matmuls."""
    from k3jax.convert import keys
    from k3jax.convert.modules import state_dict_to_module

    module = abstract_module(component, tiny.CONFIG, "bfloat16")
    return state_dict_to_module(keys.table(component), state, module)


def test_unet_in_bfloat16(unets):
    theirs, unet, projection = unets
    state = {k: v for k, v in theirs.state_dict().items() if "encoder_hid_proj" not in k}
    rng = np.random.default_rng(10)
    sample = rng.standard_normal((3, 16, 8, 4), np.float32)
    timesteps = np.full(3, 480.0, np.float32)
    arguments = (projection, sample, timesteps, prompt(rng, (9, 1, 60)))
    got = our_unet_output(in_bfloat16("unet", state), *arguments)
    expected = our_unet_output(unet, *arguments)
    assert got.dtype == jnp.float32
    assert 0 < np.abs(got - expected).mean() < 0.05 * np.abs(expected).mean()


@pytest.fixture(scope="module")
def movqs():
    theirs = tiny.torch_movq()
    return theirs, tiny.ours("movq", tiny.CONFIG, theirs.state_dict())


def decode_anew():
    """A program of its own, for constants that a test changes."""
    return jax.jit(lambda movq, latents: movq.decode(latents))


decode = decode_anew()


def test_movq_encode(movqs):
    theirs, ours = movqs
    images = np.random.default_rng(7).uniform(-1, 1, (1, 32, 48, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.encode(tiny.nchw(images)).latents.numpy()
    got = jax.jit(lambda m, x: m.encode(x))(ours, images)
    assert tiny.relative_error(got, tiny.nhwc(expected)) < TOLERANCE


@pytest.mark.parametrize("strip_pixels", [2**17, 256])
def test_movq_decode(movqs, monkeypatch, strip_pixels):
    """In one piece, and in strips of a few rows with chunked attention."""
    from k3jax.model import attention, movq_blocks

    monkeypatch.setattr(movq_blocks, "STRIP_PIXELS", strip_pixels)
    if strip_pixels < 2**17:
        monkeypatch.setattr(attention, "QUERY_CHUNK", 7)
    theirs, ours = movqs
    latents = np.random.default_rng(8).standard_normal((2, 4, 6, 4), np.float32)
    with torch.no_grad():
        expected = theirs.decode(tiny.nchw(latents), force_not_quantize=True).sample.numpy()
    got = (decode if strip_pixels == 2**17 else decode_anew())(ours, latents)
    assert tiny.relative_error(got, tiny.nhwc(expected)) < TOLERANCE


@pytest.mark.parametrize("strips", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_movq_decodes_in_strips(movqs, strips):
    """The layout for TPUs: as the image in one piece, two of a batch beside each other."""
    theirs, ours = movqs
    latents = np.random.default_rng(9).standard_normal((2, 8, 6, 4), np.float32)
    with torch.no_grad():
        expected = theirs.decode(tiny.nchw(latents), force_not_quantize=True).sample.numpy()
    decode = jax.jit(lambda m, x: m.decoder(m.post_quant_conv(x), x, strips=strips))
    got = decode(ours, latents)
    assert tiny.relative_error(got, tiny.nhwc(expected)) < TOLERANCE


def test_movq_in_bfloat16(movqs):
    theirs, ours = movqs
    latents = np.random.default_rng(11).standard_normal((2, 4, 6, 4), np.float32)
    got = decode(in_bfloat16("movq", theirs.state_dict()), latents)
    expected = decode(ours, latents)
    assert got.dtype == jnp.float32
    assert 0 < np.abs(got - expected).mean() < 0.05 * np.abs(expected).mean()


@pytest.mark.slow
def test_decoding_never_quantises(movqs):
    """VQModel.decode looks latents up in the codebook unless told not to; the model was not
    trained to be sampled that way."""
    theirs, ours = movqs
    latents = np.random.default_rng(9).standard_normal((1, 4, 6, 4), np.float32)
    with torch.no_grad():
        quantised = theirs.decode(tiny.nchw(latents)).sample.numpy()
    got = jax.jit(lambda m, x: m.decode(x))(ours, latents)
    assert tiny.relative_error(got, tiny.nhwc(quantised)) > 0.05


def test_full_size_parameter_counts():
    config = ModelConfig()
    counts = {
        name: parameter_count(abstract_module(name, config, "bfloat16"))
        for name in ("text_encoder", "text_projection", "unet", "movq")
    }
    assert counts["text_encoder"] == 8_721_797_632
    assert counts["unet"] == 3_038_562_820
    null_embedding = config.unet.cross_attention_dim
    assert counts["unet"] + counts["text_projection"] - null_embedding == 3_055_348_228
    assert counts["movq"] == 270_603_567
    inpainting = dataclasses.replace(config, unet=UNetConfig(in_channels=9))
    assert parameter_count(abstract_module("unet", inpainting)) == 3_038_571_460
