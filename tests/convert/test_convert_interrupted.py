# SPDX-License-Identifier: Apache-2.0
"""Conversions and exports that fail, are killed, or may not be written where they should."""

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from k3jax.checkpoints.format import read_checkpoint
from k3jax.checkpoints.restore import verify
from k3jax.convert import from_torch, to_torch
from k3jax.convert.from_torch import convert
from k3jax.convert.rules import ConversionError
from k3jax.convert.to_torch import export
from k3jax.files import CheckpointError
from k3jax.locks import FolderLock

from conversions import quiet


def test_destinations_that_exist(converted, tmp_path):
    source, ours, _ = converted
    for destination in (ours, tmp_path):
        (tmp_path / "file").write_text("something")
        with pytest.raises(CheckpointError, match="exists"):
            quiet(convert, source, destination)
        with pytest.raises(ConversionError, match="exists already"):
            quiet(export, ours, destination)
    assert os.listdir(tmp_path) == ["file"]
    assert not verify(ours)


def test_exports_of_damaged_checkpoints_and_other_layouts(converted, tmp_path):
    ours = shutil.copytree(converted[1], tmp_path / "ours")
    with pytest.raises(ConversionError, match="must be 'diffusers' or 'original'"):
        quiet(export, ours, tmp_path / "back", "onnx")
    with pytest.raises(ConversionError, match="must be one of"):
        quiet(export, ours, tmp_path / "back", "original", variant="turbo")
    file = max((ours / "unet").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="unet is damaged"):
        quiet(export, ours, tmp_path / "back")
    with pytest.raises(CheckpointError):
        quiet(export, tmp_path, tmp_path / "back")
    assert os.listdir(tmp_path) == ["ours"]


def test_a_failure_leaves_nothing_and_can_be_run_again(converted, tmp_path, monkeypatch):
    source, ours, _ = converted
    with monkeypatch.context() as patch:
        calls = []

        def failing(rule, array):
            calls.append(rule)
            if len(calls) == 200:
                raise OSError(28, "No space left on device")
            return np.ascontiguousarray(array)

        patch.setattr(to_torch, "to_torch_array", failing)
        with pytest.raises((OSError, ValueError)):
            quiet(export, ours, tmp_path / "back")
        patch.undo()
        patch.setattr(from_torch, "to_jax_array", failing)
        calls.clear()
        with pytest.raises(OSError, match="No space left"):
            quiet(convert, source, tmp_path / "ours")
    assert os.listdir(tmp_path) == []


SLOW = """
import sys, time
from k3jax.convert import from_torch
real = from_torch.to_jax_array
count = 0
def slow(*args):
    global count
    count += 1
    if count == 200:
        print("half way", flush=True)
        time.sleep(60)
    return real(*args)
from_torch.to_jax_array = slow
from_torch.convert(sys.argv[1], sys.argv[2], progress=False)
"""


@pytest.mark.slow
def test_a_kill_leaves_nothing_that_looks_like_a_checkpoint(converted, tmp_path):
    source, ours, _ = converted
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, str(source), str(tmp_path / "out")], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"half way\n"
        process.send_signal(signal.SIGKILL)
    (left,) = os.listdir(tmp_path)  # the marked folder in which it was working
    assert left.startswith("out.incomplete")
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / left)
    quiet(convert, source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]  # the leftover was cleared away
    assert not verify(tmp_path / "out")
    assert read_checkpoint(tmp_path / "out").fingerprint == read_checkpoint(ours).fingerprint


def test_an_export_clears_what_a_killed_one_left(converted, tmp_path):
    left = tmp_path / "out.incomplete-0123" / "unet"
    left.mkdir(parents=True)
    (left / "diffusion_pytorch_model-00001-of-00002.safetensors").write_bytes(b"half")
    lock = FolderLock(left.parent)
    assert lock.take()
    with pytest.raises(CheckpointError, match="Another run is writing"):
        quiet(export, converted[1], tmp_path / "out")
    lock.close()
    quiet(export, converted[1], tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out" / "movq") == os.listdir(tmp_path / "out" / "unet")
