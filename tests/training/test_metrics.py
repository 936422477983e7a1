# SPDX-License-Identifier: Apache-2.0
"""What a run tells: lines, JSONL, TensorBoard, pictures; signals, step time and MFU."""

import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from k3jax.training.loss_plot import plot_losses
from k3jax.training.metrics import MetricWriter, read_metrics
from k3jax.training.signals import agree, stop_requested
from k3jax.training.training_speed import StepTimer, flops_of, model_flop_utilisation, peak_flops


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder):
    """The events of all TensorBoard files, read record by record as TFRecord defines them."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]


def test_each_step_is_one_line(tmp_path, capsys):
    with MetricWriter(tmp_path / "run", progress=True) as writer:
        writer.write(10, {"loss": 0.123456, "learning_rate": 1e-4})
        writer.write(20, {"loss": jnp.float32(0.5), "learning_rate": 1e-4})
        writer.write(20, {"validation_loss": 0.25})
    first, second = lines(tmp_path / "run")
    assert first["step"] == 10 and first["loss"] == 0.123456 and "nonfinite" not in first
    assert second["step"] == 20 and (second["loss"], second["validation_loss"]) == (0.5, 0.25)
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["step", "10", "loss", "0.1235", "learning_rate", "0.0001"]
    assert out[0].index("learning_rate") == out[1].index("learning_rate")
    with MetricWriter(tmp_path / "run", progress=False) as writer:
        writer.resume(20)
        writer.write(30, {"loss": 1})
        with pytest.raises(ValueError, match="step 20 after those of step 30"):
            writer.write(20, {"loss": 1})
        with pytest.raises(ValueError, match="cannot be called 'time'"):
            writer.write(30, {"time": 1})
    assert [record["step"] for record in lines(tmp_path / "run")] == [10, 20, 30]
    assert capsys.readouterr().out == ""


def test_what_is_not_finite_is_seen(tmp_path, capsys):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"loss": float("nan"), "gradient_norm": float("inf")})
        writer.write(2, {"loss": 0.5})
    bad, good = lines(tmp_path)
    assert bad["loss"] is bad["gradient_norm"] is None and bad["nonfinite"] is True
    assert "nonfinite" not in good
    assert "loss nan (!)" in capsys.readouterr().out


def test_a_resumed_run_has_each_step_once(tmp_path):
    with MetricWriter(tmp_path, progress=False) as writer:
        writer.resume(0)
        for step in range(1, 8):
            writer.write(step, {"loss": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # killed here
    with MetricWriter(tmp_path, progress=False) as writer:
        writer.resume(5)
        for step in range(6, 10):
            writer.write(step, {"loss": -step})
    records = lines(tmp_path)
    assert [record["step"] for record in records] == list(range(1, 10))
    assert [record["loss"] for record in records] == [1, 2, 3, 4, 5, -6, -7, -8, -9]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]
    restarts = [event.step for event in events(tmp_path) if event.session_log.status]
    assert restarts[-1] == 6  # TensorBoard hides what came from step 6 on


def test_tensorboard_files_hold_numbers_and_pictures(tmp_path):
    grid = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    with MetricWriter(tmp_path, progress=False) as writer:
        writer.write(3, {"loss": 0.5})
        writer.images(3, "samples", grid)
        writer.images(3, "ema", grid[:4])
        with pytest.raises(ValueError, match=r"uint8 \(h, w, 3\), not float32 \(8, 12, 3\)"):
            writer.images(3, "samples", np.float32(grid))
    values = [(e.step, v) for e in events(tmp_path) for v in e.summary.value]
    assert [(step, v.simple_value) for step, v in values if v.tag == "loss"] == [(3, 0.5)]
    (image,) = [v.image for _, v in values if v.tag == "samples"]
    assert (image.height, image.width) == (8, 12)
    written = np.asarray(Image.open(tmp_path / "samples/step_00000003.png"))
    np.testing.assert_array_equal(written, grid)
    assert np.asarray(Image.open(tmp_path / "samples/step_00000003_ema.png")).shape == (4, 12, 3)


def test_training_goes_on_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.delitem(sys.modules, "k3jax.training.tensorboard", raising=False)
    with pytest.warns(UserWarning, match=r"pip install 'k3jax\[train\]'") as caught:
        with MetricWriter(tmp_path, progress=False) as writer:
            writer.write(1, {"loss": 1})
            writer.write(2, {"loss": 1})
    assert len(caught) == 1 and len(lines(tmp_path)) == 2


def test_only_the_first_process_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricWriter(tmp_path / "run") as writer:
        writer.resume(0)
        writer.write(1, {"loss": 1})
        writer.images(1, "samples", np.zeros((2, 2, 3), np.uint8))
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_step_time_leaves_out_pauses_and_compilation():
    now = [0.0]
    devices = [types.SimpleNamespace(device_kind="TPU v4")] * 2
    timer = StepTimer(8, 55e12, devices, window=3, clock=lambda: now[0])
    now[0] = 100.0  # compiled
    timer.mark(1)
    assert timer.metrics() == {}
    for step, seconds in ((11, 5.0), (21, 5.0), (31, 60.0)):
        now[0] += seconds
        timer.mark(step)
    now[0] += 2.0
    with timer.pause(jnp.zeros(1)):
        now[0] += 1000.0
    now[0] += 2.0
    timer.mark(41)  # 0.4 s a step
    # The window holds 0.5, 6.0 and 0.4.
    assert timer.metrics() == pytest.approx({"step_time": 0.5, "images_per_s": 16.0, "mfu": 0.2})
    for step in (51, 61):
        now[0] += 4.0
        timer.mark(step)
    assert timer.metrics()["step_time"] == pytest.approx(0.4)


def test_mfu_is_known_or_left_out():
    def device(kind):
        return types.SimpleNamespace(device_kind=kind)

    v5e = [device("TPU v5 lite")] * 4
    assert model_flop_utilisation(4 * 197e12, 2.0, v5e) == pytest.approx(0.5)
    peaks = {
        "TPU v5": 459e12,
        "TPU v5p": 459e12,
        "TPU v6 lite": 918e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "TPU v4 lite": None,
        "TPU v99": None,
        "cpu": None,
    }
    assert {kind: peak_flops(device(kind)) for kind in peaks} == peaks
    assert model_flop_utilisation(1e12, 1.0, jax.devices()) is None
    assert model_flop_utilisation(None, 1.0, v5e) is None
    assert model_flop_utilisation(1e12, 1.0, [*v5e, device("cpu")]) is None


def test_flops_of_a_program():
    a = jnp.ones((32, 64))
    assert flops_of(jax.jit(lambda a: a @ a.T).lower(a).compile()) == pytest.approx(
        2 * 32 * 64 * 32
    )

    def fails():
        raise NotImplementedError

    for analysis in (fails, lambda: None, lambda: [], lambda: {}, lambda: {"flops": -1.0}):
        assert flops_of(types.SimpleNamespace(cost_analysis=analysis)) is None
    assert flops_of(types.SimpleNamespace(cost_analysis=lambda: [{"flops": 3}])) == 3.0


SIGNALLED = """
    import os, signal, sys, time
    from k3jax.training.signals import stop_requested

    old = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_requested() as stop:
        print("ready", stop.requested, flush=True)
        while stop.requested is None:
            time.sleep(0.001)
        print(stop.requested, flush=True)
        if sys.argv[1] == "twice":
            time.sleep(60)
    print((signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == old)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "twice"])
def test_signals_become_a_flag(how):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SIGNALLED), how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "ready None\n"
        name = "SIGTERM" if how == "SIGTERM" else "SIGINT"
        process.send_signal(getattr(signal, name))
        assert process.stdout.readline() == f"{name}\n"
        if how == "twice":
            process.send_signal(signal.SIGINT)
        # Not communicate, which loses what readline has read ahead.
        out, err = process.stdout.read(), process.stderr.read()
        process.wait(timeout=30)
    finally:
        process.kill()
    assert f"{name}: stopping after this step" in err
    if how == "twice":
        assert process.returncode in (1, -signal.SIGINT) and "KeyboardInterrupt" in err
    else:
        assert process.returncode == 0 and out == "True\n"


def test_the_first_signal_is_the_one_named(capfd):
    with stop_requested() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert agree(True) is True and agree(False) is False


def test_losses_are_drawn(tmp_path):
    rng = np.random.default_rng(0)
    with MetricWriter(tmp_path, progress=False) as writer:
        for step in range(1, 400):
            loss = 2 * np.exp(-step / 80) + 0.1 * rng.random()
            more = {"validation_loss": loss + 0.1} if step % 100 == 0 else {}
            writer.write(step, {"loss": np.nan if step == 200 else loss, **more})
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "losses.png")
    image = np.asarray(Image.open(tmp_path / "losses.png")).astype(int)
    assert image.shape == (540, 960, 3)
    blue = (image[:, :, 2] > 140) & (image[:, :, 0] < 60)
    rows, columns = np.nonzero(blue[48:])
    # The curve falls: it is high at the left, low at the right, and spans the picture.
    assert rows[columns < 120].mean() < rows[columns > 800].mean() - 200
    assert columns.min() < 100 and columns.max() > 900
    red = (image[:, :, 0] > 180) & (image[:, :, 1] < 60)
    assert abs(np.nonzero(red)[1].mean() - 510) < 5  # step 200 of 399

    (tmp_path / "one.jsonl").write_text('{"step": 5, "loss": 0.5}\n')
    plot_losses(tmp_path / "one.jsonl", tmp_path / "one.png")
    (tmp_path / "none.jsonl").write_text('{"step": 5, "loss": null}\n')
    with pytest.raises(ValueError, match="no finite loss"):
        plot_losses(tmp_path / "none.jsonl", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    assert len(list(read_metrics(tmp_path / "metrics.jsonl"))) == 399
