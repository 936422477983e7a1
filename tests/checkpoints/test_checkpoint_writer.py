# SPDX-License-Identifier: Apache-2.0
"""Destinations of a checkpoint: it appears whole or not at all, and takes nobody's place."""

import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from k3jax.checkpoints import writer as checkpoint_writer
from k3jax.checkpoints.format import read_checkpoint
from k3jax.checkpoints.restore import verify
from k3jax.checkpoints.writer import CheckpointWriter
from k3jax.files import CheckpointError

from checkpoints import CONFIG, disk_arrays, write


def test_tokenizer_is_copied(tmp_path):
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "spiece.model").write_bytes(b"abc")
    with CheckpointWriter(tmp_path / "c") as writer:
        writer.add_tokenizer(tmp_path / "tok")
        writer.write("text_projection", disk_arrays("text_projection"))
        writer.commit(CONFIG, {}, "float32")
    assert (tmp_path / "c" / "tokenizer" / "spiece.model").read_bytes() == b"abc"
    (tmp_path / "c" / "tokenizer" / "spiece.model").write_bytes(b"abd")
    (tmp_path / "c" / "stranger").touch()
    assert [fault.split(" ", 1)[1] for fault in verify(tmp_path / "c")] == [
        "has other bytes than when it was written (its checksum differs)",
        "is not in the manifest",
    ]
    with pytest.raises(CheckpointError, match="not a folder with a tokenizer"):
        with CheckpointWriter(tmp_path / "d") as writer:
            writer.add_tokenizer(tmp_path / "nowhere")


def test_existing_destination(tmp_path, ckpt):
    with pytest.raises(CheckpointError, match="exists already"):
        write(ckpt)
    write(ckpt, projection=disk_arrays("text_projection", seed=5), overwrite=True)
    assert verify(ckpt) == []
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        write(tmp_path / "home", overwrite=True)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt", "empty", "home"]


def test_exception_leaves_nothing_and_keeps_the_old_one(tmp_path, ckpt):
    for path in (tmp_path / "new", ckpt):
        with pytest.raises(KeyboardInterrupt):
            with CheckpointWriter(path, overwrite=True) as writer:
                writer.write("text_projection", disk_arrays("text_projection"))
                raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]
    assert verify(ckpt) == []
    with pytest.raises(RuntimeError, match="without commit"):
        with CheckpointWriter(tmp_path / "new"):
            pass
    with pytest.raises(CheckpointError, match=r"norm\.scale occurs twice"):
        with CheckpointWriter(tmp_path / "new") as writer:
            for _ in range(2):
                writer.write("text_projection", {"norm.scale": np.ones(8, np.float32)})
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]


def test_bucket_gets_its_config_last(tmp_path, monkeypatch):
    """Where nothing can be renamed: played on a local disk that claims to be remote."""
    monkeypatch.setattr(checkpoint_writer, "is_local", lambda path: False)
    with pytest.raises(KeyboardInterrupt):
        with CheckpointWriter(tmp_path / "c") as writer:
            writer.write("text_projection", disk_arrays("text_projection"))
            monkeypatch.setattr(type(writer.folder), "rmtree", lambda *a, **k: None)  # killed
            raise KeyboardInterrupt
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="is not a k3jax checkpoint"):
        read_checkpoint(tmp_path / "c")
    monkeypatch.setattr(checkpoint_writer, "is_local", lambda path: False)
    write(tmp_path / "c")
    assert verify(tmp_path / "c") == []


KILLED = """
    import os, signal, sys
    import numpy as np
    from k3jax.checkpoints import writer as checkpoint_writer
    checkpoint_writer.GROUP_BYTES = 1
    with checkpoint_writer.CheckpointWriter(sys.argv[1]) as writer:
        writer.write("text_projection", {"norm.scale": np.ones(8, np.float32)})
        writer.write("text_projection", {"norm.bias": np.ones(8, np.float32)})
        print("writing", flush=True)
        sys.stdin.read()
"""


@pytest.mark.slow
def test_kill_leaves_nothing_that_looks_like_a_checkpoint(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "c")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout.readline() == "writing\n"
            with pytest.raises(CheckpointError, match="Another run is writing"):
                write(tmp_path / "c")
        finally:
            process.send_signal(signal.SIGKILL)
    left = list(tmp_path.iterdir())
    assert [path.name.rpartition("-")[0] for path in left] == ["c.incomplete"]
    with pytest.raises(CheckpointError):
        read_checkpoint(left[0])
    write(tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert verify(tmp_path / "c") == []
