# SPDX-License-Identifier: Apache-2.0
"""The same command again: after the end, after a mistake, a full disk, or beside another process.

The loss is a stub that compiles in a second; everything around it is a real run of a LoRA.
"""

import builtins
import contextlib
import errno
import itertools
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from k3jax.checkpoints.lora_files import load_lora
from k3jax.config import LoraConfig
from k3jax.training import training_run
from k3jax.training.metrics import MetricWriter, read_metrics
from k3jax.training.run_folder import LOCK_FILE
from k3jax.training.signals import Stop
from k3jax.training.tasks.lora_finetuning import LoraDenoising
from k3jax.training.training_run import train


@pytest.fixture
def quick(run, stub_loss, monkeypatch):
    """Makes the TrainingRun of a LoRA run of 4 steps, with a checkpoint after 2 and 4."""
    monkeypatch.setattr(training_run, "_model_flops", lambda *args: None)
    monkeypatch.setattr(LoraDenoising, "frozen_modules", lambda task: {})

    def make(**changes):
        lora = LoraConfig(rank=1, targets=("to_q",))
        return run(**{"cached": False, "lora": lora, **changes})

    return make


@pytest.fixture
def no_work(monkeypatch):
    """Whatever takes long is a fault."""

    def forbid():
        for name in ("open_data", "first_weights", "frozen_modules", "save_result"):
            monkeypatch.setattr(LoraDenoising, name, None)
        monkeypatch.setattr(training_run, "run_loop", None)

    return forbid


def weights(path):
    return {
        f"{layer}.{key}": value
        for layer, pair in load_lora(path).weights.items()
        for key, value in pair.items()
    }


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], name)


def test_a_finished_run_is_finished(quick, no_work, capfd):
    result = train(quick())
    made = weights(result)
    no_work()
    assert train(quick()) == result
    assert "is finished: it has all 4 steps" in capfd.readouterr().out
    assert_equal(weights(result), made)
    with pytest.raises(ValueError, match=r"has 4 steps, and train.steps is 2: give --steps 4"):
        train(quick(steps=2))


def test_more_steps_replace_the_result_by_that_of_a_longer_run(quick, tmp_path):
    result = train(quick())
    short = weights(result)
    assert train(quick(steps=6)) == result
    longer = weights(train(quick(steps=6, output=str(tmp_path / "longer"))))
    assert_equal(weights(result), longer)
    assert any((short[name] != longer[name]).any() for name in short)
    steps = [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("step", [1, 2])
def test_a_stopped_run_ends_with_the_bits_of_one_that_was_not(quick, tmp_path, monkeypatch, step):
    """Stopped as a signal does it: after this step, with a checkpoint; then resumed."""
    whole = weights(train(quick(output=str(tmp_path / "whole"), ema_decay=0.9)))

    @contextlib.contextmanager
    def stopping():
        stop, write = Stop(), MetricWriter.write

        def count(self, number, values):
            write(self, number, values)
            stop.requested = "SIGTERM" if number == step else stop.requested

        with monkeypatch.context() as patch:
            patch.setattr(MetricWriter, "write", count)
            yield stop

    with monkeypatch.context() as patch:
        patch.setattr(training_run, "stop_requested", stopping)
        assert train(quick(ema_decay=0.9)) is None
    folder = tmp_path / "run"
    saved = max(int(path.name) for path in (folder / "checkpoints").iterdir())
    assert saved == len(list(read_metrics(folder / "metrics.jsonl"))) == step + 1
    assert not (folder / "lora").exists()
    assert_equal(weights(train(quick(ema_decay=0.9))), whole)
    steps = [record["step"] for record in read_metrics(folder / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4]


def test_more_steps_of_a_cosine_are_refused_before_any_work(quick, no_work):
    cosine = {"optimizer": {"schedule": "cosine"}}
    train(quick(**cosine))
    no_work()
    with pytest.raises(ValueError, match="every learning rate of a cosine schedule depends"):
        train(quick(steps=6, **cosine))


def test_a_result_that_is_gone_is_made_again(quick):
    result = train(quick())
    made = weights(result)
    (result / "weights.npz").unlink()
    (result / "lora.json").unlink()
    result.rmdir()
    assert_equal(weights(train(quick())), made)


def test_without_its_metrics_a_run_still_ends(quick, tmp_path):
    result = train(quick())
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b"\xff\x00\n[]\n")
    assert train(quick()) == result


def test_a_mistake_leaves_the_folder_to_the_corrected_command(quick, tmp_path, monkeypatch):
    mistakes = [
        {"data": {"kind": "folder", "path": str(tmp_path / "pictires")}},
        {"data": {"resolution": 65}},
        {"validation_batches": 3},
    ]
    for mistake in mistakes:
        with pytest.raises(ValueError, match=r"pictires|multiple of 64|ask for fewer"):
            train(quick(**mistake))
        assert not (tmp_path / "run" / "run.json").exists()
    # Nor does a run that ends before its first checkpoint, whose advice is to change it.
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="lower"):
        patch.setattr("k3jax.training.loop._mean", lambda waiting: {"loss": float("nan")})
        train(quick())
    train(quick(optimizer={"learning_rate": 1e-4}))


def test_goes_on_from_the_newest_checkpoint_that_is_whole(quick, tmp_path):
    result = train(quick())
    made = weights(result)
    (tmp_path / "run" / "result.json").unlink()
    for path in (tmp_path / "run" / "checkpoints" / "4").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.warns(UserWarning, match="checkpoints/4 cannot be read .* resumes from the newest"):
        assert train(quick()) == result
    assert_equal(weights(result), made)
    assert (tmp_path / "run" / "damaged_checkpoints" / "4").is_dir()


HOLDER = """
    import fcntl, sys

    with open(sys.argv[1], "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 1)
        print("locked", flush=True)
        sys.stdin.read()
"""


def test_a_second_process_is_refused_before_any_work(quick, no_work, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path / "run" / LOCK_FILE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline() == b"locked\n"
    with monkeypatch.context():
        no_work()
        with pytest.raises(ValueError, match=r"another process is training in .*run now: wait for"):
            train(quick())
    monkeypatch.undo()
    holder.kill()
    holder.wait()


class FullDisk:
    """The file system of a run's folder, full from the call number `first` on.

    Not for what Orbax writes, whose threads then wait five minutes for one another; see
    test_training_checkpoints.py.
    """

    def __init__(self, folder, first, monkeypatch):
        self.folder, self.first, self.calls = str(folder), first, 0
        for name in ("replace", "rename", "mkdir"):
            monkeypatch.setattr(os, name, self.failing(getattr(os, name)))
        monkeypatch.setattr(builtins, "open", self.failing_open(builtins.open))

    def full(self, path):
        if not os.fspath(path).startswith(self.folder) or ".orbax-" in os.fspath(path):
            return False
        self.calls += 1
        return self.calls > self.first

    def failing(self, function):
        def call(path, *args, **kwargs):
            if self.full(path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))
            return function(path, *args, **kwargs)

        return call

    def failing_open(self, function):
        def call(path, mode="r", *args, **kwargs):
            opened = function(path, mode, *args, **kwargs)
            if "r" not in mode and isinstance(path, str | os.PathLike) and self.full(path):
                opened.close()  # what is left is an empty file
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return opened

        return call


EVERY = 7
"""Of the calls that can meet a full disk, the share that is tried."""


def test_a_full_disk_at_any_moment(quick, tmp_path, monkeypatch):
    """One sentence that names the run's folder; the same command finishes it later."""
    undisturbed = weights(train(quick(output=str(tmp_path / "whole"))))
    for first in itertools.count(0, EVERY):
        output = tmp_path / f"run{first}"
        with monkeypatch.context() as patch:
            disk = FullDisk(output, first, patch)
            try:
                train(quick(output=str(output)))
                assert disk.calls <= first
                assert first > 10
                return
            except (OSError, ValueError) as error:
                text = f"{getattr(error, 'filename', '')} {error}"
                assert str(output) in text and "No space left" in text, (first, text)
        assert_equal(weights(train(quick(output=str(output)))), undisturbed)
        names = {path.name for path in output.iterdir()}
        assert not [name for name in names if "incomplete" in name or name.endswith(".part")]
