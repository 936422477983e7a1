# SPDX-License-Identifier: Apache-2.0
"""The command of jobset.yaml as a pod of two processes, which loses one and is restarted.

When a pod is lost, a JobSet sends SIGTERM to the others, waits terminationGracePeriodSeconds, and
starts all pods again with the same command.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from manifests import argv, container, replicated_job


HOSTS, PROMPTS, PER_SHARD = 2, 24, 2
SHARDS = PROMPTS // PER_SHARD

pytestmark = pytest.mark.slow


class Pod:
    """The pods of the JobSet's one slice, with a folder instead of the bucket."""

    def __init__(self, folder):
        self.bucket, job = folder / "bucket", replicated_job()["template"]["spec"]
        self.bucket.mkdir()
        self.grace = job["template"]["spec"]["terminationGracePeriodSeconds"]
        self._container = container(job)
        self._hosts, self._logs = job["completions"], folder
        self.output = self.bucket / "pictures"
        bin_folder = folder / "bin"  # like the image: k3jax as pip installs it
        bin_folder.mkdir()
        script = bin_folder / "k3jax"
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m k3jax "$@"\n')
        script.chmod(0o755)
        self.processes: list[subprocess.Popen] = []
        self._path = f"{bin_folder}:{os.environ['PATH']}"

    def start(self, attempt):
        """Starts both processes, as kubelets do."""
        started = [self._start(index, attempt) for index in range(HOSTS)]
        self.processes += started
        return started

    def _start(self, index, attempt):
        given = {
            # Set by an Indexed Job, by JobSet through the downward API, and by GKE for TPUs.
            "JOB_COMPLETION_INDEX": str(index),
            "JOB_INDEX": "0",
            "TPU_WORKER_ID": str(index),
            "TPU_WORKER_HOSTNAMES": ",".join(
                f"k3jax-slice-0-{k}.k3jax" for k in range(self._hosts)
            ),
            "TPU_SKIP_MDS_QUERY": "true",
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "HOSTNAME": socket.gethostname(),
        }
        own = {
            entry["name"]: self._filled_in(entry["value"])
            for entry in self._container["env"]
            if "value" in entry
        }
        # Of this machine's environment only PATH, and that it has no TPU.
        outside = {"PATH": self._path, "HOME": str(self._logs), "JAX_PLATFORMS": "cpu"}
        outside |= {k: v for k, v in os.environ.items() if k == "PYTHONPATH"}
        words = [self._filled_in(word) for word in argv(self._container, given)]
        with open(self._logs / f"pod-{index}-{attempt}.log", "w") as log:
            return subprocess.Popen(
                words, env=outside | given | own, cwd="/", stdout=log, stderr=log
            )

    def _filled_in(self, word):
        """Fills in the manifest, for a small model and few images per shard."""
        word = re.sub(r"gs://YOUR-BUCKET/weights/\w+", "tiny", word)
        word = word.replace("gs://YOUR-BUCKET/prompts.parquet", f"{self.bucket}/prompts.txt")
        word = word.replace("gs://YOUR-BUCKET", str(self.bucket))
        word = re.sub(r"^--samples-per-shard=.*", f"--samples-per-shard={PER_SHARD}", word)
        return re.sub(r"^--hosts=.*", f"--hosts={HOSTS}", word)

    def log(self, index, attempt):
        return (self._logs / f"pod-{index}-{attempt}.log").read_text()

    def finished(self):
        """Shard -> when its sidecar was written, which is the last of it."""
        return {
            int(path.stem): path.stat().st_mtime_ns
            for path in self.output.glob("metadata/*.parquet")
        }


@pytest.fixture
def pod(tmp_path):
    made = Pod(tmp_path)
    # Arguments that a user would append.
    made._container["args"] += ["--steps=2", "--size=64x64"]
    colors = ("red", "green", "blue", "yellow")
    rows = [f"a {colors[k % 4]} circle number {k}" for k in range(PROMPTS)]
    (made.bucket / "prompts.txt").write_text("\n".join(rows) + "\n")
    yield made
    for process in made.processes:
        process.kill()


def test_a_pod_that_loses_a_process_ends_whole(pod):
    processes = pod.start(0)
    deadline = time.monotonic() + 900
    mine = set(range(1, SHARDS, HOSTS))  # of the process with index 1
    while not set(pod.finished()) & mine:
        codes = [process.poll() for process in processes]
        assert codes in ([None, None], [0, None]), pod.log(0, 0) + pod.log(1, 0)
        assert time.monotonic() < deadline
        time.sleep(0.005)
    processes[1].kill()
    assert processes[1].wait(60) == -signal.SIGKILL
    processes[0].terminate()  # if it has not finished its share already
    # The last code is for a process that has not installed its handlers yet.
    assert processes[0].wait(pod.grace) in (0, 128 + signal.SIGTERM, -signal.SIGTERM)
    before = pod.finished()
    assert set(before) & mine and mine - set(before), "no shard was lost: choose smaller shards"

    processes = pod.start(1)
    for index, process in enumerate(processes):
        assert process.wait(900) == 0, pod.log(index, 1)
    after = pod.finished()
    assert sorted(after) == list(range(SHARDS))
    assert {shard: after[shard] for shard in before} == before  # and none is generated twice
    assert f"{len(mine)} of them here (host 1 of 2 by --host)" in pod.log(1, 1)
    manifest = json.loads((pod.output / "manifest.json").read_text())
    assert manifest["samples"] == PROMPTS
    # Both use the cache of the manifest.
    assert list((pod.bucket / "cache" / "xla").iterdir())

    verified = subprocess.run(
        [sys.executable, "-m", "k3jax", "verify", pod.output],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        timeout=300,
    )
    assert verified.returncode == 0, verified.stdout + verified.stderr
    print(f"\n{len(before)} of {SHARDS} shards were finished when the pod was lost")
