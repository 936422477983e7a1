# SPDX-License-Identifier: Apache-2.0
"""Against stored outputs of the original code, for what only it has (tests/reference)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k3jax.config import MAX_TOKENS, SamplerConfig
from k3jax.model.conditioning import Conditioning
from k3jax.model.context import Context, PromptEmbeds
from k3jax.pipelines.programs import encode_text
from k3jax.pipelines.text_to_image import Kandinsky3Pipeline
from k3jax.sampling.denoise import denoise, initial_state, loop_rows, predictor
from k3jax.sampling.samplers import make_sampler

import tiny
from reference import cases
from reference.ours import component, config, last, pipeline


TOLERANCE = 1e-5  # of the output's scale


def windowed(states, mask) -> Context:
    """The context of text that is already projected and cut to its window."""
    rows = states.shape[1]
    bias = np.zeros(states.shape[:2], np.float32)
    if mask is not None:
        bias = np.where(mask.astype(bool), 0, np.finfo(np.float32).min)
    return Context(jnp.asarray(states), jnp.asarray(bias), jnp.full(len(states), rows))


@jax.jit
def run_unet(unet, x, t, context):
    return unet(x, t, context)


def some_slow(names, slow: set[str]):
    """Cases whose like is in the default lane are slow."""
    return [pytest.param(n, marks=pytest.mark.slow) if n in slow else n for n in names]


RUNS = cases.load("original_unet")["meta"]["runs"]


@pytest.mark.parametrize("run", some_slow(RUNS, {"unet9", "unet_two_levels", "unet_no_cross"}))
def test_unet(run):
    golden = cases.load("original_unet")
    name, states, mask = golden["meta"]["runs"][run]
    unet = component("unet", name)
    x = last(golden["x"][:, : config(name).unet.in_channels])
    context = None
    if states:
        context = windowed(golden[states], golden[mask] if mask else None)
    got = run_unet(unet, x, golden["t"], context)
    assert tiny.relative_error(got, last(golden[f"{run}_output"])) < TOLERANCE


def encoded(ids, mask) -> PromptEmbeds:
    """What our encoder makes of token ids, as a pipeline would hand it on."""
    embeds = encode_text(component("text_encoder"), ids, mask)
    return PromptEmbeds(embeds, mask.astype(bool), np.minimum(mask.sum(1) + 1, MAX_TOKENS))


@pytest.mark.parametrize("tokens", [1, 3, 9, 128, 140])
def test_context_has_zero_padding_after_the_projection(tokens):
    golden = cases.load("original_text")
    ids, mask = (golden[f"prompt_{tokens}_{k}"] for k in ("input_ids", "attention_mask"))
    expected, expected_mask = (golden[f"prompt_{tokens}_{k}"] for k in ("context", "context_mask"))
    context = component("text_projection")(encoded(ids, mask), "original")
    length = int(context.lengths[0])
    assert length == expected.shape[1]
    got = np.asarray(context.hidden_states)[:, :length]
    assert tiny.relative_error(got, expected) < TOLERANCE
    assert np.array_equal(np.asarray(context.bias)[0, :length] == 0, expected_mask[0] == 1)
    assert np.all(np.asarray(context.bias)[0, length:] == -np.inf)


def test_unconditional_context_is_the_null_embedding():
    golden = cases.load("original_text")
    expected = golden["unconditional_context"]
    rows = expected.shape[1]
    lengths = np.full(len(expected), rows)
    context = component("text_projection").unconditional(lengths, rows, "original")
    assert np.array_equal(context.hidden_states, expected)
    assert np.array_equal(context.bias == 0, golden["unconditional_context_mask"] == 1)


@pytest.mark.parametrize("negative", ["equal", "shorter", "longer"])
def test_negative_prompts_are_neither_cut_nor_padded_to_the_prompt(negative):
    """The original gives a negative the prompt's mask, and cuts it to the prompt's tokens."""
    golden = cases.load("original_text")
    text = golden["meta"]["negatives_of_prompt_9"][f"negative_{negative}"]
    whole = cases.IdTokenizer()(text, max_length=MAX_TOKENS, truncation=True)["input_ids"]
    ids = np.zeros((1, MAX_TOKENS), int)
    ids[0, : len(whole)] = whole
    mask = (np.arange(MAX_TOKENS) < len(whole))[None].astype(int)
    theirs_ids = golden[f"negative_{negative}_input_ids"]
    theirs_mask = golden[f"negative_{negative}_attention_mask"]
    same = np.array_equal(ids, theirs_ids) and np.array_equal(mask, theirs_mask)
    assert same == (negative == "equal")

    prompt_window = int(golden["prompt_9_attention_mask"].sum()) + 1
    embeds = encoded(ids, mask)
    widened = PromptEmbeds(
        embeds.embeds, embeds.attention_mask, np.maximum(embeds.lengths, prompt_window)
    )
    context = component("text_projection")(widened, "original")
    assert context.lengths[0] == max(len(whole) + 1, prompt_window)
    assert int((context.bias[0] == 0).sum()) == len(whole)
    if negative == "equal":
        expected = golden["negative_equal_context"]
        got = np.asarray(context.hidden_states)[:, : expected.shape[1]]
        assert tiny.relative_error(got, expected) < TOLERANCE


def test_movq():
    golden = cases.load("original_movq")
    movq = component("movq")
    encode, decode = (jax.jit(lambda m, x, f=f: getattr(m, f)(x)) for f in ("encode", "decode"))
    encoded_latents = encode(movq, last(golden["image"]))
    assert tiny.relative_error(encoded_latents, last(golden["encoded"])) < TOLERANCE
    decoded = decode(movq, last(golden["latent"]))
    assert tiny.relative_error(decoded, last(golden["decoded"])) < TOLERANCE


SAMPLERS = cases.load("original_samplers")


SLOW = {"kandinsky_50", "kandinsky_30", "kandinsky_25_eta", "kandinsky_50_eta", "kandinsky30_50"}


@pytest.mark.parametrize("case", some_slow(SAMPLERS["meta"]["cases"], SLOW))
def test_sampler(case):
    """Latents after each stored step, with an analytic stand-in for the U-Net."""
    settings = SAMPLERS["meta"]["cases"][case]
    name = case.split("_")[0]
    sampler = make_sampler(
        SamplerConfig(
            name,
            num_inference_steps=settings["steps"],
            eta=settings.get("eta", 1.0),
            threshold_percentile=settings.get("percentile", 0.99),
        )
    )
    x_T, noise = cases.noise(case, settings["steps"], SAMPLERS["meta"]["latent_shape"])
    states, mask = SAMPLERS["context"], SAMPLERS["context_mask"]
    null_states = np.zeros_like(states)
    null_states[:, 0] = SAMPLERS["null_embedding"]
    null_mask = np.zeros_like(mask)
    null_mask[:, 0] = 1
    mask_of = {"context": mask, "null": null_mask}

    def analytic_unet(x, t, conditioning):
        """Reads the mask back from the attention bias, as it has no attention of its own."""
        context = conditioning.context
        return cases.analytic_eps(
            jnp, x, t, context.hidden_states, (context.bias == 0), channel_axis=3
        )

    context = windowed(states, mask_of["context"])
    unconditional = windowed(null_states, mask_of["null"]) if sampler.guided else None
    scale = jnp.full(len(states), settings.get("guidance", 3.0), jnp.float32)
    predict = predictor(analytic_unet, Conditioning(context, unconditional, scale))
    rows = {k: jnp.asarray(v) for k, v in loop_rows(sampler).items()}
    carry = initial_state(jnp.asarray(last(x_T)))
    noise = jnp.asarray(last(noise))

    @jax.jit
    def run(carry, rows, noise):
        return denoise(
            predict,
            sampler.step,
            rows,
            carry,
            key_data=None,
            step_noise=noise,
            renoise=sampler.renoise,
        )

    done = 0
    for row, step in enumerate(settings["stored"]):
        part = slice(done, step + 1)
        carry = run(carry, {k: v[part] for k, v in rows.items()}, noise[part])
        done = step + 1
        expected = last(SAMPLERS[f"{case}_latents"][row])
        assert np.abs(carry[0] - expected).max() < 2e-5 * max(np.abs(expected).max(), 1)
    assert done == sampler.num_steps


def test_tables():
    from k3jax.sampling import schedule

    for steps in (4, 5, 7, 25, 30, 50, 100, 300, 600, 1000):
        assert np.array_equal(schedule.kandinsky_timesteps(steps), SAMPLERS[f"times_{steps}"])
    assert np.array_equal(schedule.FLASH_TIMESTEPS, SAMPLERS["times_flash"])
    for steps in (1000, 50, 25):
        ours = schedule.alphas_cumprod(schedule.cosine_betas(steps))
        assert np.array_equal(ours, SAMPLERS[f"alphas_cumprod_{steps}"])


def run_pipeline(case: str, batch_size: int = 1, **kwargs):
    """Our pipeline on the prompts and the noise of a stored run; images float32, and theirs."""
    golden = cases.load(f"original_pipeline_{case}")
    meta = golden["meta"]
    pipe = pipeline(Kandinsky3Pipeline, meta["unet"], batch_size)
    images = pipe(
        meta["prompts"],
        meta["negatives"],
        height=golden["images"].shape[-2],
        width=golden["images"].shape[-1],
        num_inference_steps=meta["steps"],
        guidance_scale=meta["guidance"],
        num_images_per_prompt=meta["images_per_prompt"],
        latents=last(golden["x_T"]),
        step_noise=last(golden["step_noise"]),
        output_type="np",
        progress_bar=False,
        **kwargs,
    ).images
    return images, last(golden["images"])


@pytest.mark.parametrize(
    "case, sampler",
    [
        pytest.param("kandinsky_5", "kandinsky", marks=pytest.mark.slow),
        pytest.param("kandinsky_10", "kandinsky", marks=pytest.mark.slow),
        ("kandinsky_negative_10", "kandinsky"),
        ("flash", "flash"),
        pytest.param("kandinsky30_10", "kandinsky30", marks=pytest.mark.slow),
        ("kandinsky30_negative_10", "kandinsky30"),
    ],
)
def test_whole_pipeline(case, sampler):
    """Three prompts of different lengths in one call of ours, one call each of theirs."""
    ours, theirs = run_pipeline(case, batch_size=3, sampler=sampler)
    assert np.abs(ours - theirs).max() <= 1 / 255
