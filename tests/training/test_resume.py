# SPDX-License-Identifier: Apache-2.0
"""A run that is killed or stopped anywhere, and started again, ends with the same bits."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from k3jax.checkpoints.format import read_checkpoint
from k3jax.checkpoints.restore import iterate_leaves


CONFIG = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict()
    config.checkpoint = {base!r}
    config.train = train = ConfigDict()
    train.steps = 12
    train.batch_size = 8
    train.dtype = "float32"
    train.frozen_dtype = "float32"
    train.remat = False
    train.log_every = 1
    train.sample_every = 0
    train.ema_decay = 0.9
    train.checkpoint = ConfigDict()
    train.checkpoint.every = 3
    train.data = ConfigDict()
    train.data.kind = "scenes"
    train.data.num_scenes = 13  # captions of up to 64 bytes: the step is compiled once
    train.data.resolution = 64
    train.data.aspect_buckets = False
    train.data.cache = {cache!r}
    train.optimizer = ConfigDict()
    train.optimizer.warmup_steps = 2
    train.optimizer.learning_rate = 1e-2
    return config
"""


@pytest.fixture(scope="module")
def config(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    path = folder / "config.py"
    path.write_text(CONFIG.format(base=str(base), cache=str(folder / "cache")))
    return path


# Two devices, so that what is saved is sharded; a program for eight takes twice as long to compile.
ENVIRONMENT = {
    **os.environ,
    "PYTHONUNBUFFERED": "1",
    "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2",
}


def command(config, output):
    return [
        sys.executable, "-m", "k3jax", "train", "--config", str(config), "--output", str(output),
    ]  # fmt: skip


def finish(config, output):
    """Runs to the end; returns the weights."""
    subprocess.run(command(config, output), check=True, capture_output=True, env=ENVIRONMENT)
    return dict(iterate_leaves(read_checkpoint(output / "checkpoint"), "unet"))


def stopped_at_step(config, output, step, number):
    """Starts a run and sends a signal when the line of a step is printed; returns the exit code."""
    process = subprocess.Popen(
        command(config, output),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
    )
    for line in process.stdout:
        if line.split()[:2] == ["step", str(step)]:
            process.send_signal(number)
    return process.wait()


@pytest.mark.slow
def test_the_same_bits(config, tmp_path):
    """One run, killed and then asked to stop, beside one that nobody disturbed."""
    output = tmp_path / "run"
    for step, number in ((4, signal.SIGKILL), (8, signal.SIGTERM)):
        code = stopped_at_step(config, output, step, number)
        if number == signal.SIGKILL:
            assert code == -signal.SIGKILL
        else:
            assert code == 1  # it says that there is more to do
            saved = sorted(int(p.name) for p in (output / "checkpoints").iterdir())
            lines = (output / "metrics.jsonl").read_text().splitlines()
            assert saved[-1] == len(lines) >= step, "steps that were made are lost"
        assert not (output / "checkpoint").exists()
    resumed, uninterrupted = finish(config, output), finish(config, tmp_path / "whole")
    assert resumed.keys() == uninterrupted.keys()
    for name, value in uninterrupted.items():
        np.testing.assert_array_equal(resumed[name].view(np.uint32), value.view(np.uint32), name)
    lines = (output / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 12  # each step once
