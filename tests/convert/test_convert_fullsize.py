# SPDX-License-Identifier: Apache-2.0
"""Converting the text encoder at its real size (17.4 GB) in bounded memory, beside a plain copy."""

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from diffusers import Kandinsky3UNet

from k3jax.checkpoints.restore import iterate_leaves
from k3jax.config import TextEncoderConfig
from k3jax.convert import keys
from k3jax.convert.rules import to_torch_array
from k3jax.convert.safetensors_writer import SafetensorsWriter, shards, write_index
from k3jax.convert.tensors import open_weights

import tiny
import torch_checkpoints


LAYERS = int(os.environ.get("K3JAX_FULLSIZE_LAYERS", "32"))
MEMORY_LIMIT = 1.5e9  # bytes that a conversion may add to the process
INT8_MEMORY_LIMIT = 4e9  # bytes beside the weights themselves while these become int8
SHARD_BYTES = 5_000_000_000
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

WATCHED = """
import json, os, pathlib, sys, threading, time

def anonymous():
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])

def watch():
    global peak
    while not done.wait(0.01):
        peak = max(peak, anonymous())

source, ours = sys.argv[1:]
{imports}
base = peak = anonymous()
done = threading.Event()
thread = threading.Thread(target=watch)
thread.start()
start = time.perf_counter()
{work}
seconds = time.perf_counter() - start
done.set()
thread.join()
print(json.dumps({{"seconds": seconds, "added": peak - base, "weights": weights}}))
"""

CONVERT = WATCHED.format(
    imports="import torch\nfrom k3jax.convert.from_torch import convert",
    work="""
convert(source, ours, progress=False)
for path in pathlib.Path(ours).rglob("*"):
    if path.is_file():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
weights = 0
""",
)

LOAD_INT8 = WATCHED.format(
    imports="import jax\nfrom k3jax.checkpoints.restore import restore",
    work="""
module = restore(ours, "text_encoder", dtype="bfloat16", param_dtype="bfloat16", int8=True)
weights = sum(leaf.nbytes for leaf in jax.block_until_ready(jax.tree.leaves(module)))
""",
)


def run_watched(script: str, *paths: Path) -> dict[str, float]:
    """Seconds and bytes of a script in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-c", script, *map(str, paths)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )
    return json.loads(run.stdout.splitlines()[-1])


def write_encoder(folder: Path, config: TextEncoderConfig) -> None:
    """Random finite bfloat16 weights in the shards of transformers, tensor by tensor."""
    table = keys.table("text_encoder")
    d, inner = config.d_model, config.d_kv * config.num_heads
    attention = {"q": (d, inner), "k": (d, inner), "v": (d, inner), "o": (inner, d)}
    mlp = {"wi_0": (d, config.d_ff), "wi_1": (d, config.d_ff), "wo": (config.d_ff, d)}
    ours = {
        "embed_tokens.embedding": (config.vocab_size, d),
        "relative_attention_bias.embedding": (32, config.num_heads),
        "final_norm.scale": (d,),
    }
    for layer in range(config.num_layers):
        for name, shape in attention.items():
            ours[f"layers.{layer}.attention.{name}.kernel"] = shape
        for name, shape in mlp.items():
            ours[f"layers.{layer}.mlp.{name}.kernel"] = shape
        for name in ("attention_norm", "mlp_norm"):
            ours[f"layers.{layer}.{name}.scale"] = (d,)
    entries = {s.torch_name: (BFLOAT16, s.torch_shape) for s in table.to_torch(ours).steps}
    rng = np.random.default_rng(0)
    block = rng.integers(0, 1 << 16, 1 << 24, np.uint16) & 0xBFFF  # no exponent of all ones
    files = shards(entries, SHARD_BYTES, "model", "safetensors")
    for file, part in files.items():
        writer = SafetensorsWriter(folder / file, part)
        for name, (_, shape) in part.items():
            size = int(np.prod(shape))
            start = int(rng.integers(0, 1 << 20))
            long = np.resize(block[start:], size) if size > len(block) - start else block[start:]
            writer.write(name, long[:size].view(BFLOAT16).reshape(shape))
        writer.close()
    write_index(files, folder / "model.safetensors.index.json")


def write_source(folder: Path, config: TextEncoderConfig) -> None:
    """A diffusers checkpoint with this text encoder, and all else tiny."""
    torch_checkpoints.write_diffusers(folder)
    shutil.rmtree(folder / "text_encoder")
    write_encoder(folder / "text_encoder", config)
    fields = {**dataclasses.asdict(config), "feed_forward_proj": "gated-silu"}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(fields))
    unet = Kandinsky3UNet.from_config(
        {**tiny.torch_unet(torch_checkpoints.UNET).config, "encoder_hid_dim": config.d_model}
    )
    unet.save_pretrained(folder / "unet")


def copy_seconds(source: Path, destination: Path) -> float:
    """Time of copying all files to the disk (not only to its cache)."""
    start = time.perf_counter()
    for path in sorted(source.rglob("*")):
        if path.is_file():
            target = destination / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            descriptor = os.open(target, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    seconds = time.perf_counter() - start
    shutil.rmtree(destination)
    return seconds


@pytest.mark.slow
def test_full_size_encoder(tmp_path, capsys):
    config = TextEncoderConfig(num_layers=LAYERS)
    source, ours = tmp_path / "source", tmp_path / "ours"
    try:
        write_source(source, config)
        os.sync()
        size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
        before = copy_seconds(source, tmp_path / "copy")
        found = run_watched(CONVERT, source, ours)
        theirs = open_weights(sorted((source / "text_encoder").glob("*.safetensors")))
        table = keys.table("text_encoder")
        for name, array in itertools.islice(iterate_leaves(ours, "text_encoder"), 9):
            ((rule, torch_name),) = table.from_jax(name)
            back = to_torch_array(rule, array)
            assert np.array_equal(
                back.view(np.uint16), theirs[torch_name].read().view(np.uint16)
            ), name
        loaded = run_watched(LOAD_INT8, source, ours)
        shutil.rmtree(ours)
        after = copy_seconds(source, tmp_path / "copy")
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)  # tens of gigabytes
    copied = (before + after) / 2
    beside = loaded["added"] - loaded["weights"]
    with capsys.disabled():
        print(
            f"\n{size / 1e9:.1f} GB: converted in {found['seconds']:.1f} s, copied in "
            f"{before:.1f} and {after:.1f} s, ratio {found['seconds'] / copied:.2f}; "
            f"{found['added'] / 1e9:.2f} GB of memory added\n"
            f"loaded as {loaded['weights'] / 1e9:.1f} GB in int8, {beside / 1e9:.2f} GB beside them"
        )
    assert found["added"] <= MEMORY_LIMIT
    assert loaded["weights"] < 0.6 * size
    assert beside < INT8_MEMORY_LIMIT
