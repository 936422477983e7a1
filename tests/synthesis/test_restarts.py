# SPDX-License-Identifier: Apache-2.0
"""Every sample exactly once: restarts, other shares, changed manifests, two at the same work."""

import errno
import fcntl
import json
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow.parquet as pq
import pytest

from k3jax.cli.main import main
from k3jax.synthesis.regeneration import devices_as_recorded

import data_sets
from data_sets import contents, write_jsonl


@pytest.fixture
def prompts(tmp_path):
    rows = [{"id": f"n{k}", "prompt": f"number {k % 17}"} for k in range(50)]
    return write_jsonl(tmp_path / "prompts.jsonl", rows)


@pytest.fixture
def words(prompts, tmp_path):
    """The command for a data set of ten shards."""
    return [
        "synthesize",
        prompts,
        tmp_path / "out",
        "--size",
        "64x64",
        "--samples-per-shard",
        "5",
    ]


@pytest.fixture
def whole(words, tmp_path, made, stubs):
    """A data set that was made without interruption."""
    made(*words[:2], tmp_path / "whole", *words[3:])
    return contents(tmp_path / "whole")


def test_a_restart_makes_the_rest(words, whole, tmp_path, made, stubs):
    made(*words)
    out = tmp_path / "out"
    assert contents(out) == whole
    stubs.clear()
    out_lines, err = made(*words)
    assert out_lines == [] and not stubs and "finished: 0 images" in err[-1]  # no model is loaded

    (out / "metadata" / "000003.parquet").unlink()  # killed between the two files of a shard
    (out / "data" / "000007.tar").unlink()
    tar = out / "data" / "000005.tar"
    tar.write_bytes(tar.read_bytes()[:-1000])
    changed = out / "data" / "000006.tar"
    content = bytearray(changed.read_bytes())
    content[700] ^= 1
    changed.write_bytes(content)
    sidecar = out / "metadata" / "000008.parquet"
    sidecar.write_bytes(sidecar.read_bytes()[:-100])
    (out / "metadata" / "000009.parquet").write_bytes(
        (out / "metadata" / "000000.parquet").read_bytes()
    )
    out_lines, err = made(*words)
    assert [line.split(":")[0] for line in out_lines] == [
        f"data/{shard:06d}.tar" for shard in (3, 5, 6, 7, 8, 9)
    ]
    notes = "\n".join(err)
    assert "data/000005.tar has other bytes" in notes and "data/000007.tar is missing" in notes
    assert "metadata/000008.parquet is damaged" in notes
    assert "000009.parquet is that of shard 0" in notes
    assert contents(out) == whole


@pytest.mark.parametrize("check, seen", [("sha256", 2), ("size", 1), ("none", 0)])
def test_how_finished_shards_are_checked(words, tmp_path, made, stubs, check, seen):
    made(*words)
    for shard, change in ((1, lambda b: b[:-1000]), (2, lambda b: bytes(len(b)))):
        tar = tmp_path / "out" / "data" / f"{shard:06d}.tar"
        tar.write_bytes(change(tar.read_bytes()))
    assert len(made(*words, "--check", check)[0]) == seen


def test_more_and_fewer_processes(words, whole, tmp_path, made, stubs):
    """Shares of 3, then of 2, then of 1, each stopped early, change nothing in the result."""
    out = tmp_path / "out"
    for job in (0, 2):
        _, err = made(*words, "--job", job, "--jobs", "3")
        assert err[-1].startswith(f"k3jax: share {job} of 3 is finished: ")
        assert err[-1].endswith("of the shares 1, 2." if job == 0 else "of the shares 1.")
        assert "the data set is not whole" in err[-1]
    assert len(list(out.glob("metadata/*"))) == 7
    for name in ("000000", "000006"):
        (out / "metadata" / f"{name}.parquet").unlink()
    made(*words, "--job", "1", "--jobs", "2", "--batch-size", "16")
    _, err = made(*words)
    assert err[-1].startswith("k3jax: finished: ")
    assert set(contents(out)) == set(whole)
    different = [name for name, digest in contents(out).items() if whole[name] != digest]
    # What another batch shape made says so, and the stub's images do not depend on it.
    assert different == ["metadata/000001.parquet", "metadata/000007.parquet"]
    lines = made("verify", out)[0]
    assert any("made with 2 images per device" in line and "1, 7" in line for line in lines)
    made_on = [json.loads(pq.read_schema(out / name).metadata[b"k3jax"]) for name in different]
    assert {note["made_on"]["images_per_device"] for note in made_on} == {2}


@pytest.mark.parametrize(
    "change, names",
    [
        (["--seed", "1"], "settings.seed is 1 and was 0"),
        (["--steps", "3"], "settings.sampler.num_inference_steps is 3 and was 2"),
        (["--size", "64x128"], "settings.height is 128 and was 64"),
        (["--image-format", "png"], 'settings.image_format is "png" and was "jpeg"; settings.qual'),
        (["--samples-per-shard", "6"], "settings.samples_per_shard is 6 and was 5"),
        (["--dtype", "float32"], 'settings.dtype is "float32" and was "bfloat16"'),
        (["--negative-prompt", "dull"], 'settings.negative_prompt is "dull" and was null'),
        ("prompts", "prompts.files.0.sha256 is"),
        ("jax", 'versions.jax is "0.0.1" and was "'),
        ("weights", "weights.fingerprint is"),
    ],
)
def test_another_data_set_is_refused(
    words, prompts, tmp_path, made, refuses, stubs, monkeypatch, change, names
):
    made(*words)
    before = contents(tmp_path / "out")
    if change == "prompts":
        prompts.write_text(prompts.read_text().replace("number 3", "number x"))
    elif change == "jax":
        real = data_sets_versions()
        monkeypatch.setattr("k3jax.synthesis.data_set.versions", lambda: {**real, "jax": "0.0.1"})
    elif change == "weights":
        monkeypatch.setattr("k3jax.synthesis.weights.Weights.identity", {"fingerprint": "f" * 64})
    message = refuses(*words, *(change if isinstance(change, list) else []))
    assert "holds another data set" in message and names in message
    assert contents(tmp_path / "out") == before


def data_sets_versions():
    from k3jax.synthesis.run_manifest import versions

    return versions()


def test_prompts_elsewhere_are_the_same(words, prompts, made, stubs):
    moved = prompts.rename(prompts.with_name("moved.jsonl"))
    made(words[0], moved, *words[2:])
    moved.rename(prompts)
    assert made(*words)[0] == []


def test_a_data_set_from_before_a_column(words, tmp_path, made, stubs):
    """It is completed without the column; a new one has it, in sidecars and shards."""
    out = tmp_path / "out"
    made(*words)
    assert "prompt_cut" in pq.read_schema(out / "metadata" / "000001.parquet").names
    path = out / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest.pop("added_columns") == ["prompt_cut"]
    path.write_text(json.dumps(manifest))
    (out / "metadata" / "000001.parquet").unlink()
    assert made(*words)[0] == ["data/000001.tar: 5 images"]
    assert "prompt_cut" not in pq.read_schema(out / "metadata" / "000001.parquet").names
    for number, expected in ((0, True), (1, False)):
        with tarfile.open(out / "data" / f"00000{number}.tar") as archive:
            record = json.load(archive.extractfile(archive.getnames()[1]))
        assert ("prompt_cut" in record) == expected
    made("verify", out)
    made("regenerate", out, "n5", "-o", tmp_path / "again")


def test_a_manifest_changed_by_hand(words, tmp_path, made, refuses, stubs):
    made(*words)
    manifest = tmp_path / "out" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 0', '"seed": 1'))
    assert "manifest.json is damaged (its fingerprint" in refuses(*words)
    manifest.write_text("{")
    assert "manifest.json is damaged" in refuses("verify", tmp_path / "out")
    assert "is not a data set of k3jax" in refuses("verify", tmp_path)


def test_a_folder_with_something_else(words, tmp_path, refuses):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    assert "holds thesis.tex and no data set: take an empty folder" in refuses(*words)


def test_the_clock_means_nothing(words, whole, tmp_path, made, stubs, monkeypatch):
    """Files from the future, and a clock that runs backwards."""
    import os

    made(*words)
    out = tmp_path / "out"
    for path in out.rglob("*"):
        os.utime(path, (5e9, 5e9))
    (out / "metadata" / "000004.parquet").unlink()
    ticks = iter(range(10**9, 0, -100))
    monkeypatch.setattr(time, "time", lambda: float(next(ticks)))
    made(*words)
    assert contents(out) == whole


@pytest.fixture
def lock(tmp_path):
    """Locks a byte of the data set's lock file from another process, until the function it returns
    is called."""

    def take(byte):
        script = (
            "import fcntl, sys; f = open(sys.argv[1], 'r+'); print(fcntl.lockf(f, fcntl.LOCK_EX,"
        )
        script += " 1, int(sys.argv[2])), flush=True); sys.stdin.read()"
        other = subprocess.Popen(
            [sys.executable, "-c", script, tmp_path / "out" / ".lock", str(byte)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert other.stdout.readline() == "None\n"
        return lambda: other.communicate("")

    return take


def test_a_share_that_another_process_has(words, tmp_path, made, refuses, stubs, lock):
    """It is refused before any weights are loaded, and shares of another number are not."""
    made(*words, "--job", "1", "--jobs", "2")
    stubs.clear()
    release = lock((1 << 40) + 2 * (1 << 20) + 0)
    assert "share 0 of 2" in refuses(*words, "--job", "0", "--jobs", "2")
    assert not stubs
    made(*words)
    release()


def test_a_shard_that_another_process_makes(words, tmp_path, made, refuses, stubs, lock):
    """It is locked, whatever the other process calls its share."""
    made(*words, "--job", "1", "--jobs", "2")
    release = lock(0)
    assert "shard 0 of" in refuses(*words)
    release()
    made(*words)


def test_without_locks_both_write_the_same(words, whole, tmp_path, checkpoint, stubs, monkeypatch):
    """On a file system without locks: two runs at once, from the first shard to the last."""

    def lockf(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    command = [str(word) for word in [*words, "--checkpoint", checkpoint]]
    with ThreadPoolExecutor(2) as pool:
        assert [f.result() for f in [pool.submit(main, command) for _ in range(2)]] == [0, 0]
    assert contents(tmp_path / "out") == whole


@pytest.mark.slow
def test_two_processes_with_one_share(words, whole, tmp_path, checkpoint):
    """The second refuses, before it has loaded anything; the first is not disturbed."""
    script = [sys.executable, stub_script(), "0.15", *map(str, words), "--checkpoint", checkpoint]
    first = subprocess.Popen(script, env=data_sets.environment(), stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "data/000000.tar: 5 images\n"
    first.send_signal(signal.SIGSTOP)  # a slow machine would end the first before the second asks
    second = subprocess.run(
        script, env=data_sets.environment(), capture_output=True, text=True, timeout=100
    )
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 2 and second.stdout == ""
    assert "share 0 of 1" in second.stderr
    first.communicate(timeout=100)
    assert first.returncode == 0
    assert contents(tmp_path / "out") == whole


@pytest.mark.slow
def test_two_processes_without_locks(words, whole, tmp_path, checkpoint):
    patch = "import fcntl, errno\ndef no(*a): raise OSError(errno.ENOLCK, 'no locks')\n"
    patch += "fcntl.lockf = no\nimport runpy, sys\nsys.argv = sys.argv[1:]\n"
    patch += "runpy.run_path(sys.argv[0], run_name='__main__')"
    script = [sys.executable, "-c", patch, stub_script(), "0.02", *map(str, words)]
    script += ["--checkpoint", str(checkpoint)]
    both = [subprocess.Popen(script, env=data_sets.environment()) for _ in range(2)]
    assert [process.wait(100) for process in both] == [0, 0]
    assert contents(tmp_path / "out") == whole


def stub_script() -> str:
    import stub_pipeline

    return stub_pipeline.__file__


def test_leavings_of_killed_processes_are_removed(words, whole, tmp_path, made, stubs):
    made(*words)
    for name in ("data/.000003.tar.abc.part", "metadata/.000004.parquet.abc.part"):
        (tmp_path / "out" / name).write_text("half")
    with open(tmp_path / "out" / ".lock", "r+") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX, 1, 20)  # of a shard that is not there
    made(*words)
    assert contents(tmp_path / "out") == whole


def test_meshes_as_they_were_recorded():
    """Also that of the text encoder, unless another is asked for."""
    made_on = {"images_per_device": 2, "mesh": {"fsdp": 2, "tensor": 1}}
    devices = devices_as_recorded(made_on, None, None)
    assert dict(devices.mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert devices.encoder_mesh == devices.mesh and devices.batch_size == 16
    made_on["encoder_mesh"] = {"fsdp": 1, "tensor": 8}
    devices = devices_as_recorded(made_on, None, 8)
    assert devices.encoder_mesh.shape["tensor"] == 8 and devices.batch_size == 8
    devices = devices_as_recorded(made_on, "data=2,fsdp=4", None)
    assert devices.encoder_mesh == devices.mesh and devices.mesh.shape["fsdp"] == 4
    with pytest.raises(ValueError, match="splits a batch over 8 devices"):
        devices_as_recorded(made_on, None, 12)
