# SPDX-License-Identifier: Apache-2.0
"""Token ids against transformers' own tokenizer, and what a prompt may not be."""

import numpy as np
import pytest
from transformers import T5Tokenizer

from k3jax.config import MAX_TOKENS
from k3jax.model import tokenizer
from k3jax.model.tokenizer import PromptTruncatedWarning, Tokenizer

import torch_checkpoints
from random_checkpoint import write_byte_tokenizer
from tools import NO_VOCABULARY, missing


PROMPTS = ["A red cat", "", "  two  spaces\tand a tab ", "Ünïcödé — кот 猫", "storm " * 200]


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    """A folder as published: nothing but spiece.model."""
    folder = tmp_path_factory.mktemp("spiece")
    torch_checkpoints.write_spiece(folder)
    return folder


@pytest.mark.filterwarnings("ignore::k3jax.model.tokenizer.PromptTruncatedWarning")
def test_ids_are_those_of_the_references(spiece):
    """max_length padding to 128 tokens, end-of-sequence kept (diffusers' encode_prompt)."""
    ids, mask = Tokenizer(spiece)(PROMPTS)
    theirs = T5Tokenizer.from_pretrained(spiece)(
        PROMPTS, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="np"
    )
    assert np.array_equal(ids, theirs["input_ids"])
    assert np.array_equal(mask, theirs["attention_mask"].astype(bool))
    assert mask.sum(1)[-1] == MAX_TOKENS and ids[-1, -1] == 1


def test_real_vocabulary():
    folder = torch_checkpoints.real_tokenizer() or missing(NO_VOCABULARY)
    ids, mask = Tokenizer(folder)(["A cute corgi lives in a house made out of sushi."])
    expected = [71, 5295, 4301, 122, 23, 1342, 16, 3, 9, 629, 263, 91, 13, 26297, 5, 1]
    assert ids[0, : len(expected)].tolist() == expected and mask.sum() == len(expected)


def test_a_warning_says_what_is_cut(spiece):
    with pytest.warns(
        PromptTruncatedWarning, match=r"prompt 1 has \d+ tokens .* cut off: '.*storm"
    ):
        Tokenizer(spiece)(["a", "storm " * 200])


def test_a_folder_in_a_bucket_is_copied(tmp_path, monkeypatch):
    write_byte_tokenizer(tmp_path)
    expected = Tokenizer(tmp_path)(["a cat"])
    monkeypatch.setattr(tokenizer, "is_local", lambda path: False)
    for ours, theirs in zip(Tokenizer(tmp_path)(["a cat"]), expected, strict=True):
        assert np.array_equal(ours, theirs)


def test_what_is_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"neither tokenizer.json nor spiece.model"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("prompt", ["a\x00b", "bell\x07", "esc\x1b[0m", "half \ud800 pair"])
def test_control_characters(tmp_path, prompt):
    write_byte_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"prompt 0 has the control character U\+"):
        Tokenizer(tmp_path)([prompt])
