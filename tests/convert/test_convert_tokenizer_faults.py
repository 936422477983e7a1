# SPDX-License-Identifier: Apache-2.0
"""Tokenizers that cannot be read are refused before the conversion, and by `info --verify`."""

import json
import shutil

import pytest
from etils import epath

from k3jax.checkpoints.manifest import file_digest, read_manifest, write_manifest
from k3jax.checkpoints.restore import verify
from k3jax.convert import from_torch
from k3jax.convert.from_torch import convert
from k3jax.convert.rules import ConversionError

import tiny
from conversions import quiet, refused
from random_checkpoint import write_byte_tokenizer


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2424257\n"


@pytest.fixture
def described(copy):
    """The diffusers checkpoint with a tokenizer.json instead of spiece.model."""
    shutil.rmtree(copy / "tokenizer")
    write_byte_tokenizer(copy / "tokenizer")
    return copy


FAULTS = [
    ("tokenizer.json", POINTER, "tokenizer.json is a git-lfs pointer instead of the file"),
    ("tokenizer.json", "", "tokenizer.json is damaged: it is empty"),
    ("tokenizer.json", "{", "tokenizer.json is damaged: it is not JSON"),
    ("tokenizer.json", "[]", "tokenizer.json is damaged: it holds a list"),
    ("tokenizer.json", "{}", "tokenizer.json is damaged, or no tokenizer that transformers reads"),
    ("tokenizer.json", "{" + 10**5 * '"a":{', "tokenizer.json is damaged: "),
    ("tokenizer_config.json", "{", "tokenizer_config.json is damaged: it is not JSON"),
    ("tokenizer_config.json", "\xff\xfe", "tokenizer_config.json is text in UTF-16"),
    ("spiece.model", POINTER, "spiece.model is a git-lfs pointer"),
    ("spiece.model", "", "spiece.model is damaged: it is empty"),
]


@pytest.mark.parametrize("name, content, message", FAULTS, ids=range(len(FAULTS)))
def test_a_damaged_tokenizer_is_refused_before_the_weights_are_read(
    described, tmp_path, monkeypatch, name, content, message
):
    monkeypatch.setattr(from_torch, "_stream", lambda *args: pytest.fail("weights are read"))
    (described / "tokenizer" / name).write_text(content, "latin1")
    text = refused(described, tmp_path)
    assert str(described / "tokenizer" / message) in text and text.count("\n") == 0


def test_a_vocabulary_of_another_model(described, tmp_path):
    file = described / "tokenizer" / "tokenizer.json"
    values = json.loads(file.read_text())
    last = {"id": tiny.VOCAB + 5, "content": "<last>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    vocab = values["model"]["vocab"]
    vocab |= {f"<{i}>": i for i in range(tiny.VOCAB, tiny.VOCAB + 6)}
    values["added_tokens"].append({**last, **flags})
    file.write_text(json.dumps(values))
    assert "it is the tokenizer of another model" in refused(described, tmp_path)


def test_what_was_written_is_loaded_too(described, tmp_path, monkeypatch):
    """The copy in the destination, before the checkpoint takes its name."""
    stream = from_torch._stream

    def damaging(steps, tensors, writer, *rest):
        (writer.folder / "tokenizer" / "tokenizer.json").write_text("{")
        return stream(steps, tensors, writer, *rest)

    monkeypatch.setattr(from_torch, "_stream", damaging)
    text = refused(described, tmp_path)
    assert "out.incomplete" in text and "tokenizer.json is damaged" in text


def test_verify_loads_the_tokenizer_and_sharing_too(described, tmp_path):
    quiet(convert, described, tmp_path / "ours")
    assert verify(tmp_path / "ours") == []
    ours = epath.Path(tmp_path / "ours")
    (ours / "tokenizer" / "tokenizer.json").write_text(POINTER)
    digests = read_manifest(ours)["components"]
    (ours / "manifest.json").unlink()
    write_manifest(ours, digests, file_digest, {})  # as a converter wrote it that did not look
    (fault,) = verify(ours)
    assert f"{ours / 'tokenizer' / 'tokenizer.json'} is a git-lfs pointer" in fault
    shutil.rmtree(described / "tokenizer")
    with pytest.raises(ConversionError, match=r"tokenizer\.json is a git-lfs pointer"):
        quiet(convert, described, tmp_path / "flash", text_encoder_from=ours)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "ours"]
