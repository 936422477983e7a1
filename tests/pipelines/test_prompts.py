# SPDX-License-Identifier: Apache-2.0
"""Mixed prompts, weighted words, and prompts that are too long."""

import numpy as np
import pytest

from k3jax import PromptEmbeds, mix_prompts
from k3jax.config import MAX_TOKENS
from k3jax.model.tokenizer import PromptTruncatedWarning
from k3jax.pipelines.prompts import weighted_words

from pictures import picture


def run(pipe, embeds, **kwargs):
    kwargs = dict(height=64, width=64, num_inference_steps=6, sampler="ddpm") | kwargs
    made = pipe(prompt_embeds=embeds, output_type="np", progress_bar=False, **kwargs)
    return np.asarray(made.images)


@pytest.fixture(scope="module")
def embeds(base):
    return base.encode_prompt(["a cat", "two dogs on a hill"])


def test_a_mixture_is_between_its_prompts(base, embeds):
    """Its ends are the prompts themselves; one more prompt in the middle, one latent noise."""
    mixed = mix_prompts(embeds, [[2, 0], [1, 1], [0, 0.5]])
    assert len(mixed) == 3 and mixed.lengths.tolist() == [7, 20, 20]
    for k, row in ((0, 0), (2, 1)):
        mask = embeds.attention_mask[row]
        assert np.array_equal(mixed.attention_mask[k], mask)
        assert np.array_equal(mixed.embeds[k][mask], embeds.embeds[row][mask])
        assert (mixed.token_weights[k] == 1).all()
    middle = (embeds.embeds[0, :6] + embeds.embeds[1, :6]) / 2
    assert np.allclose(mixed.embeds[1, :6], middle, atol=1e-6)
    # Where only the longer one has tokens, they are seen with its share.
    assert np.array_equal(mixed.embeds[1, 6:19], embeds.embeds[1, 6:19])
    assert (mixed.token_weights[1, 6:19] == 0.5).all()
    first, between, second = run(base, mixed, seed=[3, 3, 3])
    plain = run(base, embeds, seed=[3, 3])
    assert np.abs(first - plain[0]).max() <= 1 / 255
    assert np.abs(second - plain[1]).max() <= 1 / 255
    assert np.abs(between - first).max() > 2 / 255 and np.abs(between - second).max() > 2 / 255


def test_a_small_share_changes_little(base, embeds):
    """Also at positions that only the other prompt reaches."""
    share = np.array([[1, 0], [0.999, 0.001]], np.float32)
    mixed = mix_prompts(embeds, share)
    # The window is that of the longer prompt in both, so that only the mixture differs.
    mixed = PromptEmbeds(
        mixed.embeds, mixed.attention_mask, mixed.lengths.clip(20), mixed[:].token_weights
    )
    none, little = run(base, mixed, seed=[3, 3])
    assert 0 < np.abs(none - little).mean() < 0.02


def test_variations_of_an_image(img2img, embeds):
    """Mixed prompts go wherever prompts go."""
    mixed = mix_prompts(embeds, [[1, 0], [0.5, 0.5]])
    made = img2img(
        prompt_embeds=mixed,
        image=picture(0),
        strength=0.5,
        num_inference_steps=6,
        sampler="ddpm",
        seed=[1, 1],
        output_type="np",
        progress_bar=False,
    ).images
    assert np.abs(made[0] - made[1]).max() > 2 / 255


@pytest.mark.parametrize(
    "weights, message",
    [
        ([1], r"weights has shape \(1, 1\) for 2 prompts"),
        ([[[1, 1]]], r"weights has shape \(1, 1, 2\)"),
        ([1, -1], "weights must be 0 or more, and one of each mixture above 0"),
        ([0, 0], "weights must be 0 or more"),
        ([1, float("nan")], "weights must be 0 or more"),
        ([3e38, 3e38], "their sum must be finite"),
    ],
)
def test_bad_weights(embeds, weights, message):
    with pytest.raises(ValueError, match=message):
        mix_prompts(embeds, weights)


@pytest.mark.parametrize("weight", ["1" * 400, "1" * 40, "2" + "0" * 30])
def test_a_weight_beyond_float32(base, weight):
    with pytest.raises(ValueError, match=r"words 'red' has .* it must be 1e.30 or le"):
        base.encode_prompt(f"a (red:{weight}) dot", word_weights=True)


@pytest.mark.parametrize(
    "prompt, text, spans",
    [
        ("a (red:1.5) dot", "a red dot", [(2, 5, 1.5)]),
        ("(big cat: 0.5) (here:2)", "big cat here", [(0, 7, 0.5), (8, 12, 2.0)]),
        (r"a \(red:1.5\) dot", "a (red:1.5) dot", []),
        ("a (note: this) (nothing) :3 (x:)", "a (note: this) (nothing) :3 (x:)", []),
        ("(:2)", "(:2)", []),
    ],
)
def test_weighted_words(prompt, text, spans):
    assert weighted_words(prompt) == (text, spans)


def test_weights_of_words(base):
    """1 changes nothing, 0 hides a word, others are in between, other prompts are not touched."""
    texts = ["a (red:1) dot", "a (red:3) dot", "a (red:0) dot", "a (red:0.5) dot"]
    weighted = base.encode_prompt(texts, word_weights=True)
    plain = base.encode_prompt("a red dot")
    assert np.allclose(weighted.embeds[0], plain.embeds[0], atol=1e-6)
    assert weighted.token_weights[1, :10].tolist() == [1, 1, 3, 3, 3, 1, 1, 1, 1, 1]
    made = run(base, weighted, seed=[3] * 4)
    assert np.abs(made[0] - run(base, plain, seed=3)[0]).max() <= 1 / 255
    for k in (1, 2, 3):
        assert np.abs(made[k] - made[0]).max() > 2 / 255
    context = base.text_projection(weighted, "diffusers")
    assert np.isneginf(np.asarray(context.bias)[2, 2:5]).all()
    assert np.allclose(np.asarray(context.bias)[1, :9], np.log([1, 1, 3, 3, 3, 1, 1, 1, 1]))
    # Without being asked for, parentheses are text.
    assert base.encode_prompt("a (red:3) dot").lengths.tolist() == [15]


def test_long_prompts(base, strict):
    long = "x" * 300
    with pytest.warns(PromptTruncatedWarning, match="prompt 0 has 301 tokens"):
        truncated = base.encode_prompt(long)
    with pytest.raises(ValueError, match="prompt 1 has 301 tokens and the model sees 128: shorten"):
        base.encode_prompt(["a", long], long_prompts="error")
    with pytest.raises(ValueError, match="long_prompts 'split' is not one of truncate, error, av"):
        base.encode_prompt("a", long_prompts="split")
    # 127 + 127 + 46 characters, each part with an end of its own.
    averaged = base.encode_prompt(["a", long], long_prompts="average")
    assert averaged.lengths.tolist() == [3, MAX_TOKENS] and averaged.token_weights is None
    parts = base.encode_prompt(["x" * 127, "x" * 127, "x" * 46])
    expected = parts.embeds[:, :47].mean(0)
    assert np.allclose(averaged.embeds[1, :47], expected, atol=1e-5)
    assert np.allclose(averaged.embeds[1, 47:], parts.embeds[0, 47:], atol=1e-5)
    assert np.allclose(averaged.embeds[0, :2], base.encode_prompt("a").embeds[0, :2], atol=1e-6)
    assert truncated.lengths.tolist() == [MAX_TOKENS]
    # A pipeline has a policy of its own.
    base.long_prompts = "error"
    try:
        with pytest.raises(ValueError, match="prompt has 301 tokens"):
            base(long, height=64, width=64)
    finally:
        base.long_prompts = "truncate"
    weighted = base.encode_prompt(f"({long}:2) b", long_prompts="average", word_weights=True)
    assert np.allclose(weighted.token_weights[0, [0, 49, 126]], 2)


def test_embeddings_of_a_bad_shape(base, embeds):
    bad = PromptEmbeds(embeds.embeds, embeds.attention_mask, embeds.lengths, np.ones((2, 5)))
    with pytest.raises(ValueError, match=r"prompt_embeds.token_weights has shape \(2, 5\)"):
        run(base, bad)
