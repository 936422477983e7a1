# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints, prompt files, and data sets compared byte by byte."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax

from k3jax.config import (
    ModelConfig,
    MoVQConfig,
    SamplerConfig,
    TextEncoderConfig,
    TextProjectionConfig,
    UNetConfig,
)
from k3jax.synthesis.run_manifest import DATA, METADATA

from random_checkpoint import write_random_checkpoint


# One level: attention to itself and to the text, down and up, in a fraction of the compile time.
MODEL = ModelConfig(
    TextEncoderConfig(vocab_size=259, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    TextProjectionConfig(d_model=32, cross_attention_dim=48, null_embedding=True),
    UNetConfig(
        init_channels=16,
        block_out_channels=(32,),
        layers_per_block=2,
        time_embedding_dim=32,
        cross_attention_dim=48,
        attention_head_dim=8,
        groups=8,
        add_cross_attention=(True,),
        add_self_attention=(True,),
    ),
    MoVQConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1, norm_num_groups=8),
    conditioning="original",
    sample_size=64,
    sampler=SamplerConfig(num_inference_steps=2),
)


def write_checkpoint(folder: Path) -> Path:
    """A checkpoint of MODEL with random weights."""
    write_random_checkpoint(folder / "checkpoint", MODEL)
    return folder / "checkpoint"


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contents(folder: Path) -> dict[str, str]:
    """Name -> sha256 of every file that belongs to the data, half-written ones included."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for part in (DATA, METADATA)
        for path in sorted((Path(folder) / part).rglob("*"))
        if path.is_file()
    }


def command(*words) -> list[str]:
    return [sys.executable, "-m", "k3jax", *map(str, words)]


def environment(**more) -> dict[str, str]:
    """Of a process that is one of a job's: one device, and the compiled programs of the tests."""
    return {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        **more,
    }


def finish(*words, **options) -> subprocess.CompletedProcess:
    """Runs the command line in a process of its own, to its end."""
    return subprocess.run(
        command(*words), env=environment(), capture_output=True, text=True, timeout=600, **options
    )
