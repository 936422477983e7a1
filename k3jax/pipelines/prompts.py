# SPDX-License-Identifier: Apache-2.0
"""Prompts that are more than one plain text: mixed, with weighted words, or longer than 128 tokens.

A weight multiplies the attention that the U-Net pays to a token, against that to the others: 0
hides it, 1 leaves it as it is. It applies after the text projection, whose LayerNorm would undo a
scaled embedding.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from k3jax.config import MAX_TOKENS
from k3jax.model.context import PromptEmbeds, window_length
from k3jax.model.tokenizer import Tokenizer, warn_of_cut


LongPrompts = Literal["truncate", "error", "average"]

LARGEST_WEIGHT = 1e30
"""Of words; well inside float32, in which weights are added up and multiplied."""

WEIGHTED = re.compile(r"\\([()])|\(([^()]+?):\s*(\d+(?:\.\d*)?|\.\d+)\s*\)")


@dataclass(frozen=True)
class Windows:
    """Token windows to be encoded; several of one prompt where it is encoded in parts.

    Attributes:
        input_ids, attention_mask: (n, MAX_TOKENS).
        token_weights: float32 (n, MAX_TOKENS), or None.
        prompt_of: which prompt each window is of, rising.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    token_weights: np.ndarray | None
    prompt_of: np.ndarray


def mix_prompts(embeds: PromptEmbeds, weights: Sequence[float] | np.ndarray) -> PromptEmbeds:
    """Mixtures of prompts: the weighted mean of their embeddings at each position.

    A token at a position that only some of the prompts reach has the share of these.
    `[1, 0]` is the first prompt itself, `[[1, 0], [0.5, 0.5], [0, 1]]` goes to the second in steps.

    Args:
        embeds: n prompts, from `encode_prompt`.
        weights: (n,) for one mixture, or (m, n) for m of them; they need not sum to 1.

    Raises:
        ValueError: weights of another number, negative, or none above 0.
    """
    weights = np.atleast_2d(np.asarray(weights, np.float32))
    if weights.ndim != 2 or weights.shape[1] != len(embeds):
        raise ValueError(f"weights has shape {weights.shape} for {len(embeds)} prompts.")
    with np.errstate(over="ignore"):
        total = weights.sum(1, keepdims=True)
    if not np.isfinite(total).all() or (weights < 0).any() or (total <= 0).any():
        raise ValueError(
            "weights must be 0 or more, and one of each mixture above 0; their sum must be finite."
        )
    weights /= total
    parts = [_mixed(embeds, row) for row in weights]
    return PromptEmbeds(*(np.stack(part) for part in zip(*parts, strict=True)))


def plain_prompts(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    policy: LongPrompts,
    word_weights: bool,
    names: Sequence[str],
) -> Windows:
    """The windows of tokens of prompts.

    Args:
        policy: for prompts of more than MAX_TOKENS; see `BasePipeline.long_prompts`.
        word_weights: read "(words:1.5)" as weights; \\( and \\) are parentheses.
        names: of the prompts in messages.

    Raises:
        ValueError: no such policy, or a prompt that is too long under "error".
    """
    if policy not in get_args(LongPrompts):
        known = ", ".join(get_args(LongPrompts))
        raise ValueError(f"long_prompts {policy!r} is not one of {known}.")
    if policy == "truncate" and not word_weights:
        ids, mask = tokenizer(prompts, names)
        return Windows(ids, mask, None, np.arange(len(prompts)))
    spans: list[list] = [[] for _ in prompts]
    if word_weights:
        prompts, spans = zip(*map(weighted_words, prompts), strict=True)
    rows, prompt_of = [], []
    for number, (tokens, places) in enumerate(tokenizer.whole(prompts, names)):
        values = [_weight(place, spans[number]) for place in places]
        for part in _windows(tokenizer, names[number], tokens, values, policy):
            rows.append(part)
            prompt_of.append(number)
    ids = np.zeros((len(rows), MAX_TOKENS), np.int32)
    mask, token_weights = np.zeros(ids.shape, bool), np.ones(ids.shape, np.float32)
    for row, (tokens, values) in enumerate(rows):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, True
        token_weights[row, : len(tokens)] = values
    return Windows(ids, mask, token_weights if word_weights else None, np.array(prompt_of))


def join_windows(windows: Windows, vectors: np.ndarray) -> PromptEmbeds:
    """One row per prompt: the mean at each position of the windows that reach it.

    Args:
        vectors: embeddings (n, MAX_TOKENS, d_model) of the windows.
    """
    mask, prompt_of = windows.attention_mask, windows.prompt_of
    lengths = np.asarray(window_length(mask.sum(1)), np.int32)
    embeds = PromptEmbeds(vectors, mask, lengths, windows.token_weights)
    if np.array_equal(prompt_of, np.arange(len(embeds))):
        return embeds
    rows = []
    for number in range(prompt_of[-1] + 1):
        mine = embeds[prompt_of == number]
        vectors, mask, length, shares = _mixed(mine, np.full(len(mine), 1 / len(mine), np.float32))
        reached = np.maximum(mine.attention_mask.mean(0), 1 / len(mine))
        rows.append((vectors, mask, length, np.where(mask, shares / reached, 1)))
    joined = PromptEmbeds(*(np.stack(part) for part in zip(*rows, strict=True)))
    if embeds.token_weights is None:
        joined = PromptEmbeds(joined.embeds, joined.attention_mask, joined.lengths)
    return joined


def weighted_words(prompt: str) -> tuple[str, list[tuple[int, int, float]]]:
    """ "a (red:1.5) dot" -> ("a red dot", [(2, 5, 1.5)]): the plain text, and what has a weight.

    Raises:
        ValueError: a weight beyond `LARGEST_WEIGHT`.
    """
    text, spans, end = "", [], 0
    for found in WEIGHTED.finditer(prompt):
        text += prompt[end : found.start()]
        end = found.end()
        escaped, words, weight = found.groups()
        if words is not None:
            if float(weight) > LARGEST_WEIGHT:
                raise ValueError(
                    f"the weight of the words {words[:80]!r} has {len(weight)} characters "
                    f"({weight[:10]}...): it must be {LARGEST_WEIGHT:.0e} or less."
                )
            spans.append((len(text), len(text) + len(words), float(weight)))
        text += escaped or words
    return text + prompt[end:], spans


def _weight(place: tuple[int, int], spans) -> float:
    first, end = place
    return next((w for start, stop, w in spans if first < min(end, stop) and start < end), 1.0)


def _windows(tokenizer, name, tokens, values, policy):
    """(tokens, weights) of each window of a prompt; every window ends as the prompt does."""
    if len(tokens) <= MAX_TOKENS:
        return [(tokens, values)]
    most, count = MAX_TOKENS - 1, len(tokens)
    if policy == "error":
        raise ValueError(
            f"{name} has {count} tokens and the model sees {MAX_TOKENS}: shorten it, or "
            'choose what is done with long prompts: long_prompts="truncate" or "average".'
        )
    if policy == "truncate":
        warn_of_cut(name, count, tokenizer.decode(tokens[most:-1]))
        starts = [0]
    else:
        starts = range(0, count - 1, most)
    cuts = [slice(start, min(start + most, count - 1)) for start in starts]
    return [([*tokens[cut], tokens[-1]], [*values[cut], 1.0]) for cut in cuts]


def _mixed(embeds: PromptEmbeds, weights: np.ndarray):
    """(embeddings, mask, length, share of each token) of the mean with weights that sum to 1."""
    used = weights > 0
    embeds, weights = embeds[used], weights[used]
    mask = np.asarray(embeds.attention_mask, bool)
    present = weights[:, None] * mask
    total = present.sum(0)
    means = np.einsum("nt,ntd->td", present, np.asarray(embeds.embeds, np.float32))
    means /= np.where(total > 0, total, 1)[:, None]
    token_weights = 1 if embeds.token_weights is None else embeds.token_weights
    shares = np.where(total > 0, (present * token_weights).sum(0), 1).astype(np.float32)
    return means, mask.any(0), np.int32(max(embeds.lengths)), shares
