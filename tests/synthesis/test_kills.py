# SPDX-License-Identifier: Apache-2.0
"""With the small model, in processes of their own: killed at any moment, on machines that come and
go, a data set ends with the bytes of one that nobody disturbed.

K3JAX_PROOF_SAMPLES and K3JAX_PROOF_KILLS set the scale; 2000 and 50 are what the README says.
"""

import io
import os
import random
import signal
import subprocess
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import data_sets
from data_sets import contents, write_jsonl


SAMPLES = int(os.environ.get("K3JAX_PROOF_SAMPLES", "2000"))
KILLS = int(os.environ.get("K3JAX_PROOF_KILLS", "50"))
SHARDS = max(12, SAMPLES // 20)
SETTINGS = [
    *("--size", "64x64", "--dtype", "float32", "--image-format", "png", "--batch-size", "4"),
    *("--samples-per-shard", -(-SAMPLES // SHARDS), "--seed", "9"),
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def words(tmp_path_factory, checkpoint):
    """Makes the command for a folder."""
    rows = [
        {"id": f"sample {k}", "prompt": f"picture {k % 300} of many", "guidance_scale": k % 3}
        for k in range(SAMPLES)
    ]
    prompts = write_jsonl(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", rows)
    return lambda out: ["synthesize", prompts, out, "--checkpoint", checkpoint, *SETTINGS]


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """(folder, its contents, seconds to start, seconds of work) of a run nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = data_sets.finish(*words(out))  # compiles
    assert done.returncode == 0, done.stderr
    again = out.with_name("again")
    start = time.monotonic()
    process = spawn(words(again))
    while not list(again.glob("metadata/*.parquet")):
        time.sleep(0.02)
    started = time.monotonic()
    assert process.wait(3600) == 0
    assert contents(out) == contents(again)
    assert len(contents(out)) == 2 * SHARDS
    return out, contents(out), started - start, time.monotonic() - started


def spawn(words, *more, log=subprocess.DEVNULL):
    return subprocess.Popen(
        data_sets.command(*words, *more), env=data_sets.environment(), stdout=log, stderr=log
    )


def wait_for_shards(process, out, count):
    """Until a process has finished so many more shards, or has begun one, or has ended."""
    before, data = set(out.glob("metadata/0*")), set(out.glob("data/.*"))
    while process.poll() is None:
        if count and len(set(out.glob("metadata/0*")) - before) >= count:
            return
        if not count and set(out.glob("data/.*")) - data:
            return
        time.sleep(0.005)


def finished_are_right(out, whole):
    """Every shard that claims to be finished has its bytes already."""
    now = contents(out)
    for name in now:
        if name.startswith("metadata/") and ".part" not in name:
            shard = name.split("/")[1].split(".")[0]
            for file in (name, f"data/{shard}.tar"):
                assert now[file] == whole[file]
    return sum(name.startswith("metadata/") and ".part" not in name for name in now)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_killed_at_random_moments(words, whole, tmp_path, name):
    """At the start, while shards are made and written, near the end; resumed each time."""
    _, expected, starting, working = whole
    out, rng, done, codes = tmp_path / "out", random.Random(name), [], []
    for number in range(KILLS):
        process = spawn(words(out), "--grace", "1")
        if number % 5 == 0:
            moment = rng.uniform(0, starting)
        else:
            wait_for_shards(process, out, number % 5 - 1)
            moment = rng.uniform(0, working / KILLS)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(getattr(signal, name))
        codes.append(process.wait(60))
        done.append(finished_are_right(out, expected))
        if done[-1] == SHARDS:  # too fast: there must be something left to be killed at
            for path in rng.sample(sorted(out.glob("metadata/*.parquet")), SHARDS // 2):
                path.unlink()
    last = data_sets.finish(*words(out))
    assert last.returncode == 0, last.stderr
    assert contents(out) == expected
    killed = sum(code != 0 for code in codes)
    print(
        f"\n{name}: {killed} of {KILLS} runs were killed, with {done} of {SHARDS} shards finished"
    )
    assert killed >= KILLS * 0.7
    # SIGTERM's own exit code, or before the handlers stand that of any process.
    assert set(codes) <= ({0, -9} if name == "SIGKILL" else {0, 143, -15})
    assert data_sets.finish("verify", out).returncode == 0


def test_machines_that_come_and_go(words, whole, tmp_path):
    """3 processes, then 2, then 1, then 3 again, each killed; one of them with larger batches.

    The bytes are the same where the batches have the same shape, and pixels within 1/255 elsewhere;
    the sidecars, and so `verify`, say where that is.
    """
    folder, expected, _, working = whole
    out, rng = tmp_path / "out", random.Random(0)
    for jobs in (3, 2, 1, 3, 2):
        batch = 8 if jobs == 2 else 4
        processes = [
            spawn(words(out), "--job", job, "--jobs", jobs, "--batch-size", batch)
            for job in range(jobs)
        ]
        wait_for_shards(processes[0], out, 1)
        time.sleep(rng.uniform(0, 0.1) * working)
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
    last = data_sets.finish(*words(out))
    assert last.returncode == 0, last.stderr
    found = contents(out)
    assert set(found) == set(expected)
    other = 0
    for shard in range(SHARDS):
        name = f"{shard:06d}"
        note = pq.read_schema(out / "metadata" / f"{name}.parquet").metadata[b"k3jax"]
        if b'"images_per_device": 4' in note:
            assert found[f"data/{name}.tar"] == expected[f"data/{name}.tar"]
            assert found[f"metadata/{name}.parquet"] == expected[f"metadata/{name}.parquet"]
        else:
            other += 1
            same_pixels(out / "data" / f"{name}.tar", folder / "data" / f"{name}.tar")
    print(f"\n{other} of {SHARDS} shards were made with other batches")
    done = data_sets.finish("verify", out)
    assert done.returncode == 0, done.stdout
    assert ("made with 8 images per device" in done.stdout) == (0 < other < SHARDS)


def same_pixels(first, second):
    """The images of two shards, within 1/255."""
    import webdataset

    def images(path):
        samples = webdataset.WebDataset(str(path), shardshuffle=False)
        return {
            s["__key__"]: np.asarray(Image.open(io.BytesIO(s["png"]))).astype(int) for s in samples
        }

    ours, theirs = images(first), images(second)
    assert ours.keys() == theirs.keys()
    assert max(np.abs(ours[key] - theirs[key]).max() for key in ours) <= 1
