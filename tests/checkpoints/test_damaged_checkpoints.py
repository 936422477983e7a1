# SPDX-License-Identifier: Apache-2.0
"""Damaged checkpoints and LoRAs of ours: whatever is wrong, one sentence with the file's name."""

import os
import random

import numpy as np
import pytest

from k3jax.checkpoints import orbax_io
from k3jax.checkpoints.format import read_checkpoint
from k3jax.checkpoints.lora_files import load_lora, save_lora
from k3jax.checkpoints.restore import iterate_leaves, leaf_shapes, restore, verify
from k3jax.checkpoints.writer import CheckpointWriter
from k3jax.config import LoraConfig
from k3jax.model.adapters import update_factor
from k3jax.model.tokenizer import Tokenizer

from checkpoints import CONFIG, disk_arrays
from damages import damaged_bytes, damaged_json, refusal
from random_checkpoint import write_byte_tokenizer


MANY = int(os.environ.get("K3JAX_FUZZ", "12000"))
"""Inputs of the slow tests together, roughly."""
COMPONENTS = ("text_encoder", "text_projection")


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """The half second in which other reads of Orbax fail."""
    monkeypatch.setattr(orbax_io.time, "sleep", lambda seconds: None)


@pytest.fixture
def whole(tmp_path):
    write_byte_tokenizer(tmp_path / "tokenizer")
    with CheckpointWriter(tmp_path / "ckpt") as writer:
        writer.add_tokenizer(tmp_path / "tokenizer")
        for component in COMPONENTS:
            writer.write(component, disk_arrays(component))
        writer.commit(CONFIG, {"path": "somewhere"}, "float32")
    return tmp_path / "ckpt"


def fuzz(path, choose, damage, use, count: int, seed: int) -> dict[str, int]:
    """Damages one file after the other, or takes it away, and uses the folder.

    Args:
        choose: of the files by name, those that are damaged.
        damage: (content, rng) to content.
        use: a function of the folder.
    """
    rng = random.Random(seed)
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    files = [file for file in files if choose(str(file.relative_to(path)))]
    contents = {file: file.read_bytes() for file in files}
    found = {"refused": 0, "read": 0}
    for _ in range(count):
        file = rng.choice(files)
        if rng.random() < 0.03:
            file.unlink()
        else:
            file.write_bytes(damage(contents[file], rng))
        found["read" if refusal(lambda: use(path), path) is None else "refused"] += 1
        file.write_bytes(contents[file])
    return found


def load(path):
    """As a pipeline does it."""
    checkpoint = read_checkpoint(path)
    for component in COMPONENTS:
        restore(checkpoint, component)


def inspect(path):
    """Without the check of sizes and sums: what a bucket, or `info`, leaves to Orbax."""
    checkpoint = read_checkpoint(path)
    for component in COMPONENTS:
        shapes = leaf_shapes(checkpoint, component)
        arrays = dict(iterate_leaves(checkpoint, component))
        assert {n: a.shape for n, a in arrays.items()} == {n: s.shape for n, s in shapes.items()}


def check(path):
    assert all("\n" not in fault and str(path) in fault for fault in verify(path))


def tokenize(path):
    ids, mask = Tokenizer(path / "tokenizer")(["A red circle.", "", "\U0001f600"])
    assert ids.shape == mask.shape == (3, 128)


def use_lora(path):
    lora = load_lora(path)
    assert np.isfinite(update_factor(lora.config, 1.0)) and len(lora.fingerprint) > 60


def is_setting(name):
    return name in ("config.json", "manifest.json")


def is_orbax(name):
    return name.startswith(COMPONENTS)


def is_tokenizer(name):
    return name.startswith("tokenizer/")


def is_any(name):
    return True


def is_orbax_json(name):
    return is_orbax(name) and name.rpartition("/")[2] in ("_METADATA", "_CHECKPOINT_METADATA")


def write_lora(folder):
    rng = np.random.default_rng(0)
    pair = {"a": rng.normal(size=(8, 4)), "b": rng.normal(size=(4, 8))}
    save_lora(folder, {"down_blocks.0.to_q": pair}, LoraConfig(rank=4), "f" * 64)
    return folder


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_files(whole, tmp_path):
    assert fuzz(whole, is_setting, damaged_json, read_checkpoint, 80, 0)["refused"] > 40
    found = fuzz(whole, is_any, damaged_bytes, load, 8, 0)
    assert found["refused"] > 3, found
    fuzz(whole, is_any, damaged_bytes, check, 12, 0)
    assert fuzz(whole, is_tokenizer, damaged_json, tokenize, 10, 0)["refused"] > 2
    assert fuzz(whole, is_orbax, damaged_bytes, inspect, 8, 0)["refused"] > 0
    lora = write_lora(tmp_path / "lora")
    assert fuzz(lora, lambda name: "npz" in name, damaged_bytes, use_lora, 60, 0)["refused"] > 30
    assert fuzz(lora, lambda name: "json" in name, damaged_json, use_lora, 60, 0)["refused"] > 20
    load(whole)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_many_damaged_files(whole, tmp_path):
    print(fuzz(whole, is_setting, damaged_json, read_checkpoint, MANY // 2, 1))
    print(fuzz(whole, is_setting, damaged_json, load, MANY // 50, 2))
    print(fuzz(whole, is_any, damaged_bytes, load, MANY // 40, 3))
    print(fuzz(whole, is_any, damaged_bytes, check, MANY // 40, 4))
    print(fuzz(whole, is_tokenizer, damaged_json, tokenize, MANY // 20, 5))
    print(fuzz(whole, is_orbax, damaged_bytes, inspect, MANY // 40, 6))
    print(fuzz(whole, is_orbax_json, damaged_json, inspect, MANY // 40, 7))
    lora = write_lora(tmp_path / "lora")
    print(fuzz(lora, lambda name: "npz" in name, damaged_bytes, use_lora, MANY // 4, 8))
    print(fuzz(lora, lambda name: "json" in name, damaged_json, use_lora, MANY // 4, 9))
    load(whole)
