# SPDX-License-Identifier: Apache-2.0
"""Tokenizer folders that hold only spiece.model become whole ones."""

import numpy as np
import pytest

from k3jax.convert.rules import ConversionError
from k3jax.convert.tokenizer_files import prepare_tokenizer

import torch_checkpoints
from tools import NO_VOCABULARY, missing


def test_spiece_alone_becomes_a_whole_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    torch_checkpoints.write_spiece(tmp_path / "published")
    prepare_tokenizer((tmp_path / "published").iterdir(), tmp_path / "ours")
    assert {"spiece.model", "tokenizer.json"} <= {p.name for p in (tmp_path / "ours").iterdir()}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    ids = tokenizer("A cute corgi lives in a house.").input_ids
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=torch_checkpoints.spiece_model())
    assert ids == [*pieces.encode("A cute corgi lives in a house."), 1]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)

    (tmp_path / "published" / "spiece.model").write_bytes(b"not a model")
    with pytest.raises(
        ConversionError, match=r"published/spiece\.model is damaged, or not a T5 vocabulary"
    ):
        prepare_tokenizer((tmp_path / "published").iterdir(), tmp_path / "broken")


def test_real_vocabulary(tmp_path):
    from transformers import AutoTokenizer

    real = torch_checkpoints.real_tokenizer() or missing(NO_VOCABULARY)
    prepare_tokenizer([real / "spiece.model"], tmp_path)
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(real)
    prompt = "A cute corgi lives in a house made out of sushi."
    expected = [71, 5295, 4301, 122, 23, 1342, 16, 3, 9, 629, 263, 91, 13, 26297, 5, 1]
    assert ours(prompt).input_ids == expected
    for text in (prompt, "", "  Ünïcödé 中文 \n\t x", "<pad> </s> <extra_id_0> a", "A" * 300):
        assert ours(text).input_ids == theirs(text).input_ids, text
    np.testing.assert_equal(len(ours), len(theirs))
