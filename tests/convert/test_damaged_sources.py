# SPDX-License-Identifier: Apache-2.0
"""Damaged PyTorch checkpoints: whatever is wrong with a file, its name and one sentence."""

import json
import os
import random
import shutil
import struct

import pytest
import torch
from safetensors.torch import save

from k3jax.convert.from_torch import plan
from k3jax.convert.sources import open_source
from k3jax.convert.tensors import flat, open_pickle, open_safetensors

from damages import damaged_bytes, damaged_json, damaged_values, refusal
from torch_checkpoints import ARCHITECTURE


MANY = int(os.environ.get("K3JAX_FUZZ", "20000"))
"""Inputs of the slow tests, for each kind of file."""


def damaged_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Damaged as bytes, or in its header's values."""
    if rng.random() < 0.3:
        return damaged_bytes(content, rng)
    (size,) = struct.unpack("<Q", content[:8])
    header = json.dumps(damaged_values(json.loads(content[8 : 8 + size]), rng)).encode()
    if rng.random() < 0.2:
        header = damaged_bytes(header, rng)
    declared = (
        len(header) if rng.random() < 0.9 else rng.choice((0, 2**63, 2**64 - 1, len(header) // 2))
    )
    return struct.pack("<Q", declared) + header + content[8 + size :]


def fuzz_safetensors(folder, count: int, seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    whole = save(
        {
            "a.weight": torch.ones(3, 5),
            "b": torch.zeros(4, dtype=torch.bfloat16),
            "c": torch.zeros(0, 2),
            "d": torch.tensor(1.5, dtype=torch.float64),
        },
        {"format": "pt"},
    )
    file, found = folder / "model.safetensors", {"refused": 0, "read": 0}

    def read():
        for name, tensor in open_safetensors(file).items():
            array = tensor.read()
            assert array.shape == tensor.shape and array.dtype.name == tensor.dtype, name

    for _ in range(count):
        file.write_bytes(damaged_safetensors(whole, rng))
        found["read" if refusal(read, file) is None else "refused"] += 1
        file.unlink()  # it may be mapped: the next one is another file
    return found


def fuzz_pickles(folder, count: int, seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    file, found = folder / "model.pt", {"refused": 0, "read": 0}
    torch.save({"a.weight": torch.ones(3, 5), "b": torch.zeros(4, dtype=torch.bfloat16)}, file)
    whole = file.read_bytes()

    def read():
        for tensor in flat(open_pickle(file), file).values():
            assert tensor.read().shape == tensor.shape

    for _ in range(count):
        file.write_bytes(damaged_bytes(whole, rng))
        found["read" if refusal(read, file) is None else "refused"] += 1
        file.unlink()
    return found


def fuzz_json(source, count: int, seed: int, **settings) -> dict[str, int]:
    """The JSON files of a checkpoint: its opening, and the plan of its conversion."""
    rng = random.Random(seed)
    files = sorted(source.rglob("*.json"))
    contents = {file: file.read_bytes() for file in files}
    found = {"refused": 0, "read": 0}
    for _ in range(count):
        file = rng.choice(files)
        file.write_bytes(damaged_json(contents[file], rng))

        def read():
            plan(open_source(source, **settings), str(source))

        found["read" if refusal(read, source) is None else "refused"] += 1
        file.write_bytes(contents[file])
    return found


@pytest.fixture
def described(copy):
    """A diffusers checkpoint with every file of settings."""
    (copy / "k3jax.json").write_text('{"sample_size": 128, "sampler": {"eta": 0.5}}')
    index = {"weight_map": {}}
    for file in sorted((copy / "text_encoder").glob("*.safetensors")):
        index["weight_map"] |= dict.fromkeys(open_safetensors(file), file.name)
    (copy / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    return copy


@pytest.mark.filterwarnings("ignore:.*are settings without effect")
def test_damaged_files(described, tmp_path):
    found = fuzz_safetensors(tmp_path, 200, 0)
    assert found["refused"] > 100 and found["read"] > 3, found
    found = fuzz_pickles(tmp_path, 40, 0)
    assert found["refused"] > 12, found
    found = fuzz_json(described, 20, 0)
    assert found["refused"] > 7, found


@pytest.mark.slow
def test_many_damaged_safetensors(tmp_path):
    print(fuzz_safetensors(tmp_path, MANY, 1))


@pytest.mark.slow
def test_many_damaged_pickles(tmp_path):
    print(fuzz_pickles(tmp_path, MANY // 2, 1))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*are settings without effect")
def test_many_damaged_settings(described, original, tmp_path):
    print(fuzz_json(described, MANY // 20, 1))
    folder = shutil.copytree(original, tmp_path / "original")
    (folder / "k3jax.json").write_text('{"sample_size": 128, "sampler": {"eta": 0.5}}')
    print(fuzz_json(folder, MANY // 20, 2, architecture=ARCHITECTURE))
