# SPDX-License-Identifier: Apache-2.0
"""Model cards: what a checkpoint and PyTorch's files say of themselves."""

import dataclasses
import warnings

import numpy as np
import pytest
import yaml

from k3jax.checkpoints.cards import RELEASED, model_card
from k3jax.checkpoints.format import DEFAULT, read_checkpoint
from k3jax.checkpoints.restore import save_module, verify
from k3jax.checkpoints.writer import CheckpointWriter
from k3jax.config import ModelConfig
from k3jax.convert.to_torch import export

from random_checkpoint import MODEL, random_module


def top(card: str) -> dict:
    """The YAML block of a card."""
    _, block, text = card.split("---\n", 2)
    assert text.lstrip().startswith("# ")
    return yaml.safe_load(block)


def card(source, **changes) -> str:
    config = dataclasses.replace(ModelConfig(), **changes)
    return model_card(config, source, "float16", "0123abc")


@pytest.mark.parametrize("repo", RELEASED)
def test_released_weights(repo):
    text = card({"layout": "original", "variant": "base", "repo": repo, "sha256": "4567"})
    values = top(text)
    assert values["license"] == "apache-2.0" and values["base_model"] == repo
    assert values["pipeline_tag"] == "text-to-image" and values["library_name"] == "k3jax"
    assert "base_model_relation" not in values  # nothing of the weights was changed
    for words in ("0123abc", "4567", "50 steps", "guidance 3", "k3jax 0", "1024x1024", repo):
        assert words in text


def test_inpainting():
    unet = dataclasses.replace(ModelConfig().unet, in_channels=9)
    text = card({"repo": RELEASED[0]}, unet=unet)
    assert top(text)["pipeline_tag"] == "image-to-image" and "inpainting" in top(text)["tags"]
    assert "k3jax inpaint" in text


def test_other_weights_and_changed_ones():
    values = top(card({"layout": "diffusers", "path": "/home/me/secret"}))
    assert values["license"] == "unknown" and "base_model" not in values
    assert "secret" not in card({"path": "/home/me/secret"})
    base = {"fingerprint": "1", "source": {"repo": RELEASED[1], "layout": "original"}}
    tuned = {"layout": "k3jax train", "task": "text_to_image", "steps": 7, "base": base}
    assert top(card(tuned))["base_model"] == RELEASED[1]
    assert top(card(tuned))["base_model_relation"] == "finetune"
    assert top(card(tuned))["license"] == "unknown" and "under Apache-2.0" in card(tuned)
    assert "7 steps" in card(tuned) and f"starting as the weights converted from {RELEASED[1]}" in (
        card(tuned)
    )
    merged = {"repo": RELEASED[1], "lora": {"scale": 0.5}}
    assert top(card(merged))["base_model_relation"] == "finetune"
    assert "LoRA merged into the U-Net at scale 0.5" in card(merged)
    assert top(card({}))["license"] == "unknown"


def test_checkpoints_come_with_one(tmp_path):
    for name in "ab":
        with CheckpointWriter(tmp_path / name) as writer:
            save_module(writer, "movq", random_module("movq", MODEL, np.random.default_rng(0)))
            writer.commit(MODEL, {"repo": RELEASED[2]}, "float32")
    made = tmp_path / "a" / "README.md"
    assert read_checkpoint(tmp_path / "a").fingerprint in made.read_text()
    assert made.read_bytes() == (tmp_path / "b" / "README.md").read_bytes()
    assert verify(tmp_path / "a") == []
    made.write_text("What people write.")
    assert verify(tmp_path / "a") == []
    (tmp_path / "a" / "OTHER.md").touch()
    assert len(verify(tmp_path / "a")) == 1


def test_exports_come_with_one(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export(DEFAULT, tmp_path / "diffusers", progress=False)
    diffusers = (tmp_path / "diffusers" / "README.md").read_text()
    assert top(diffusers)["library_name"] == "diffusers" and "from_pretrained" in diffusers
    original = model_card(ModelConfig(), {}, "float16", "0123abc", "original")
    assert "library_name" not in top(original) and "ai-forever/Kandinsky-3" in original
    assert "trained with k3jax" in diffusers and read_checkpoint(DEFAULT).fingerprint in diffusers
