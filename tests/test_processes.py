# SPDX-License-Identifier: Apache-2.0
"""Two processes of four devices each, on loopback, make what one process of eight makes."""

import dataclasses
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from k3jax.cli.main import main

from random_checkpoint import MODEL, write_random_checkpoint


PROMPTS = ["a cat", "a dog on a hill", "a bird"]
# One level is compiled in half the time of two, and each mesh is compiled for.
UNET = dataclasses.replace(
    MODEL.unet, block_out_channels=(32,), add_cross_attention=(True,), add_self_attention=(True,)
)
SMALLEST = dataclasses.replace(MODEL, unet=UNET)
MESHES = {"data": ["--mesh", "data=-1"], "tensor": ["--mesh", "data=4,tensor=2"]}


def free_address() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


def words(checkpoint, output, *more) -> list[str]:
    settings = ["--checkpoint", str(checkpoint), "--output", str(output), "--dtype", "float32"]
    return ["generate", *PROMPTS, *settings, "--steps", "3", "--seed", "5", *more]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_generate(tmp_path, monkeypatch, mesh):
    write_random_checkpoint(tmp_path / "demo", SMALLEST)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(words(tmp_path / "demo", tmp_path / "one", *MESHES[mesh])) == 0
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4",
    }
    address = free_address()
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "k3jax"),
                *words(tmp_path / "demo", tmp_path / "two", *MESHES[mesh]),
                *("--distributed", f"{address},2,{number}"),
            ],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for process in processes:
        try:
            _, err = process.communicate(timeout=500)
        finally:
            process.kill()
        assert process.returncode == 0, err
    one, two = (sorted((tmp_path / name).glob("*_seed*.png")) for name in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two] and len(one) == 3
    for left, right in zip(one, two, strict=True):
        pixels = [np.asarray(Image.open(path), np.int16) for path in (left, right)]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1
        assert pixels[0].std() > 2


@pytest.mark.parametrize("text", ["yes", "host,2,0", "host:80,2,2", "host:80,2", "host:99999,2,1"])
def test_a_flag_that_cannot_be_read(capsys, text):
    assert main(["generate", "a cat", "--distributed", text]) == 2
    assert "it must be auto, or HOST:PORT,N,I" in capsys.readouterr().err


@pytest.mark.parametrize(
    "number, message",
    [
        pytest.param(
            *(0, "not all of the 2 processes have joined at {address}, after 2 seconds"),
            marks=pytest.mark.slow,
        ),
        (1, "process 0 does not answer at {address}, after 2 seconds"),
    ],
)
def test_processes_that_do_not_join(tmp_path, number, message):
    address = free_address()
    run = subprocess.run(
        [
            *(sys.executable, "-m", "k3jax", "generate", "a cat"),
            *("--distributed", f"{address},2,{number}", "--distributed-timeout", "2"),
        ],
        cwd=tmp_path,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 1 and run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"k3jax: error: {message.format(address=address)}: start all of them")
    assert "--distributed-timeout" in line


def test_nobody_else_is_there(tmp_path):
    """In a process of its own: JAX must not have been used before."""
    run = subprocess.run(
        [sys.executable, "-m", "k3jax", "generate", "a cat", "--distributed", "auto"],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI", "PMI"))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert "--distributed auto" in line and "HOST:PORT,N,I" in line
