# SPDX-License-Identifier: Apache-2.0
"""What goes wrong while a data set is made, and what stays of it."""

import errno
import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from k3jax.synthesis.image_formats import ImageFormat
from k3jax.synthesis.store import LocalStore

import data_sets
import stub_pipeline
from data_sets import contents, write_jsonl


@pytest.fixture
def words(tmp_path):
    rows = [{"id": f"n{k}", "prompt": f"number {k}"} for k in range(20)]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", rows)
    return ["synthesize", prompts, tmp_path / "out", "--size", "64x64", "--samples-per-shard", "5"]


@pytest.fixture
def whole(words, tmp_path, made, stubs):
    made(*words[:2], tmp_path / "whole", *words[3:])
    return contents(tmp_path / "whole")


class FullDisk:
    """A file on a disk that is full after some bytes."""

    room = 0

    def __init__(self, file):
        self._file = file

    def write(self, content):
        FullDisk.room -= len(content)
        if FullDisk.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._file.write(content)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *rest):
        self._file.close()


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "files"])
@pytest.mark.parametrize("room", [0, 9_000, 30_000])
def test_disk_full(words, tmp_path, made, refuses, stubs, monkeypatch, kind, room):
    """One sentence, nothing half-written; with room again the same command ends as it should."""
    import builtins

    real = builtins.open

    def limited(file, mode="r", *rest, **options):
        opened = real(file, mode, *rest, **options)
        return FullDisk(opened) if mode == "wb" and str(tmp_path / "out") in str(file) else opened

    words = [*words, "--format", kind]
    made(*words[:2], tmp_path / "whole", *words[3:])
    whole = contents(tmp_path / "whole")
    with monkeypatch.context() as patch:
        FullDisk.room = room
        patch.setattr(builtins, "open", limited)
        message = refuses(*words)
    assert "cannot be written: No space left on device" in message
    assert "Finished shards are kept" in message
    left = contents(tmp_path / "out")
    assert set(left) < set(whole) and all(whole[name] == left[name] for name in left)
    made(*words)
    assert contents(tmp_path / "out") == whole


@pytest.mark.slow
def test_a_limit_of_the_system(words, tmp_path, checkpoint):
    """Without any stand-in: the kernel refuses files of more than 16 kB."""
    words = [*words, "--checkpoint", checkpoint, "--image-format", "png"]
    limited = ["bash", "-c", 'ulimit -f 16; exec "$@"', "bash"]
    done = subprocess.run(
        [*limited, sys.executable, stub_pipeline.__file__, "0", *map(str, words)],
        env=data_sets.environment(JAX_ENABLE_COMPILATION_CACHE="0"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    assert "000000.tar cannot be written: File too large" in done.stderr
    assert contents(tmp_path / "out") == {}


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_path_that_cannot_be_written(words, tmp_path, refuses, stubs, place):
    (tmp_path / "file").touch()
    message = refuses(*words[:2], tmp_path / place, *words[3:])
    assert str(tmp_path / place) in message and not stubs
    assert "Not a directory" in message or "File exists" in message


def test_a_folder_that_becomes_unwritable(words, tmp_path, refuses, stubs, monkeypatch):
    real = os.replace

    def replace(source, target):
        if str(target).endswith("000002.tar"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    message = refuses(*words)
    assert "data/000002.tar cannot be written: Permission denied" in message
    assert len(contents(tmp_path / "out")) == 4


def test_an_encoder_that_throws(words, whole, tmp_path, made, stubs, monkeypatch):
    """The sample fails with its reason; the others are as ever."""
    real, broken = ImageFormat.encode, []

    def encode(self, pixels):
        if not broken:
            broken.append(1)
            raise ValueError("encoder error 7")
        return real(self, pixels)

    monkeypatch.setattr(ImageFormat, "encode", encode)
    _, err = made(*words, "--batch-size", "8")
    assert "20 samples" not in err[-1] and "1 samples failed" in err[-1]
    rows = pq.read_table(tmp_path / "out" / "metadata").to_pylist()
    assert [row["reason"] for row in rows if row["status"] == "failed"] == [
        "the jpeg encoder failed (ValueError('encoder error 7'))"
    ]
    good = pq.read_table(tmp_path / "whole" / "metadata").to_pylist()
    same = [a["sha256"] == b["sha256"] for a, b in zip(rows, good, strict=True)]
    assert same.count(False) == 1


def test_numbers_that_are_not_finite(tmp_path, made, stubs):
    """A sample alone, its neighbours in the batch unaffected."""
    texts = ["one", "two", "three", "four"]
    found = []
    for name, prompts in (("good", texts), ("bad", ["one", "nan", "three", "four"])):
        (tmp_path / f"{name}.txt").write_text("\n".join(prompts))
        words = ["--size", "64x64", "--batch-size", "8"]
        made("synthesize", tmp_path / f"{name}.txt", tmp_path / name, *words)
        found.append(pq.read_table(tmp_path / name / "metadata").to_pylist())
    good, bad = found
    assert bad[1]["status"] == "failed" and "are not finite" in bad[1]["reason"]
    for row in (0, 2, 3):
        assert bad[row]["sha256"] == good[row]["sha256"]


@pytest.mark.usefixtures("one_device")
def test_weights_that_are_not_finite(tmp_path, made, monkeypatch):
    """With the small model: latents of one sample overflow, those beside it do not change."""
    import numpy as np

    from k3jax.pipelines.text_to_image import Kandinsky3Pipeline

    (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
    words = ["--size", "64x64", "--dtype", "float32", "--batch-size", "4", "--image-format", "png"]
    made("synthesize", tmp_path / "p.txt", tmp_path / "good", *words)
    real = Kandinsky3Pipeline.encode_prompt

    def encode_prompt(self, prompts):
        embeds = real(self, prompts)
        embeds.embeds[prompts.index("two")] = np.nan
        return embeds

    monkeypatch.setattr(Kandinsky3Pipeline, "encode_prompt", encode_prompt)
    made("synthesize", tmp_path / "p.txt", tmp_path / "bad", *words)
    good, bad = (
        pq.read_table(tmp_path / name / "metadata").to_pylist() for name in ("good", "bad")
    )
    assert [row["status"] for row in bad] == ["ok", "failed", "ok"]
    assert bad[1]["reason"] == "12288 of the image's 12288 values are not finite"
    assert [bad[k]["sha256"] for k in (0, 2)] == [good[k]["sha256"] for k in (0, 2)]


def test_bad_lines_are_failed_samples(tmp_path, made, refuses, stubs):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": 7, "id": "x"}\n{\n{"prompt": "d"}\n')
    words = ["synthesize", path, tmp_path / "out", "--size", "64x64", "--images-per-prompt", "2"]
    refuses(*words)
    _, err = made(*words, "--skip-bad", "--samples-per-shard", "3")
    assert "4 images " in err[-1] and "4 samples failed" in err[-1]
    rows = pq.read_table(tmp_path / "out" / "metadata").to_pylist()
    assert [row["status"] for row in rows] == ["ok", "ok", *["failed"] * 4, "ok", "ok"]
    assert rows[2]["id"] == "bad:000000002-0" and rows[2]["line"] == 2
    assert rows[3]["reason"] == "p.jsonl, line 2: has the prompt 7; it must be a string"
    assert rows[4]["reason"].startswith("p.jsonl, line 3: not JSON (Expecting property name")
    assert "4 images, 4 failed samples, of 8" in made("verify", tmp_path / "out")[0][0]


def test_duplicates_are_failed_samples(tmp_path, made, stubs):
    rows = [{"id": "a", "prompt": "one"}, {"id": "b", "prompt": "two"}, {"id": "a", "prompt": "3"}]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    made("synthesize", path, tmp_path / "out", "--size", "64x64", "--skip-bad")
    rows = pq.read_table(tmp_path / "out" / "metadata").to_pylist()
    assert [row["status"] for row in rows] == ["ok", "ok", "failed"]
    assert rows[2]["reason"] == "p.jsonl, line 3: has the id 'a' of p.jsonl, line 1"
    made("verify", tmp_path / "out")


def test_a_shard_of_bad_lines_only(tmp_path, made, stubs):
    (tmp_path / "p.jsonl").write_text("{\n{\n")
    for kind in ("webdataset", "parquet", "files"):
        out = tmp_path / kind
        words = ["--size", "64x64", "--skip-bad", "--format", kind]
        made("synthesize", tmp_path / "p.jsonl", out, *words)
        assert "0 images, 2 failed samples" in made("verify", out)[0][0]


ODD_IDS = ["../../etc/passwd", "/", "..", "a/b", "a\\b", "con.", "x" * 300, "кот 猫", "<b>", "%41"]


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "files"])
def test_odd_ids(tmp_path, made, stubs, kind):
    """Paths, 300 characters, any script: nothing is written elsewhere, and each is found again."""
    path = write_jsonl(tmp_path / "p.jsonl", [{"id": i, "prompt": "a"} for i in ODD_IDS])
    out = tmp_path / "deep" / "out"
    made("synthesize", path, out, "--size", "64x64", "--format", kind)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "p.jsonl"]
    made("verify", out)
    lines, err = made("regenerate", out, *ODD_IDS, "-o", tmp_path / "again")
    assert len(lines) == len(ODD_IDS) == len(list((tmp_path / "again").iterdir()))
    assert sum("the same bytes" in line for line in err) == len(ODD_IDS)


def test_an_unknown_error_stops_the_run(words, tmp_path, run, stubs, monkeypatch):
    """A defect is not taken for a failed sample, and every thread ends."""
    import threading

    before = threading.active_count()

    def call(self, **rest):
        raise TypeError("a defect")

    monkeypatch.setattr(stub_pipeline.StubPipeline, "__call__", call)
    with pytest.raises(TypeError, match="a defect"):
        run(*words)
    assert contents(tmp_path / "out") == {}
    for thread in threading.enumerate():
        if thread.name.startswith(("encode", "image", "check")):
            thread.join(10)
    assert threading.active_count() <= before


def test_a_write_is_whole_or_nothing(tmp_path):
    store = LocalStore(tmp_path)
    with pytest.raises(RuntimeError), store.create("a/file") as file:
        file.write(b"half")
        assert store.names("") == ["a"] and not store.exists("a/file")
        raise RuntimeError
    assert store.names("a") == []
    with pytest.raises(RuntimeError), store.create_folder("a/folder") as folder:
        (folder / "x").touch()
        raise RuntimeError
    assert store.names("a") == []
    assert store.create_new("b", b"1") and not store.create_new("b", b"2")
    assert (tmp_path / "b").read_bytes() == b"1"
