# SPDX-License-Identifier: Apache-2.0
"""launch/benchmark.py: a line per case, with the plan next to the measurement."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from manifests import ROOT


SCRIPT = ROOT / "launch" / "benchmark.py"


@pytest.fixture
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("launch_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured(case, seconds, device="TPU v5 lite", **more):
    setting = {"device": device, "platform": "tpu", "devices": 4, "batch_per_device": 1}
    return {"case": case, "seconds": seconds, "images": 4, **setting, **more}


@pytest.fixture
def children(script, monkeypatch):
    """The commands that the script runs; they get fixed answers: 10 steps, 2 s encoder, ..."""
    ran = []

    def run(words, **variables):
        ran.append(words)
        program = words[words.index("--programs") + 1]
        plain = "--guidance-scale" in words
        name = "denoise_plain" if plain else program
        if words[0] == "plan":
            memory = {"peak": 10**9}
            plan = {"name": name, "seconds": 0.25, "figure": "schedule", "memory": memory}
            values = {"programs": [plan | {"share_of_peak": 0.5}], "compiler": "libtpu 1"}
            return json.dumps(values), "", 0, 1
        if words[words.index("--batch") + 1] == "8" and program == "denoise":
            return "", "note\nk3jax: error: the devices have not enough memory.\n", 2, 1
        seconds = {"encode": 2.0, "denoise": 0.5, "denoise_plain": 0.25, "decode": 1.0}[name]
        steps = 10 if program == "denoise" else 1
        made = {"of": [name], "steps": 10, "unet_passes": 10 if plain else 20}
        lines = [measured(name, seconds), measured("total", seconds * steps, **made)]
        return "\n".join(map(json.dumps, lines)), "", 0, 7

    monkeypatch.setattr(script, "_run", run)
    return ran


def lines_of(script, capsys, *words):
    code = script.main(list(words))
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.splitlines()], err


def test_cases(script, children, capsys):
    code, lines, _ = lines_of(script, capsys, "--batches", "1,2", "--config", "tiny")
    assert code == 0 and len(children) == 16  # as many plans as measurements
    names = ["encode", "denoise", "denoise_plain", "decode", "images_guided", "images_plain"]
    assert [line["case"] for line in lines] == 2 * names
    first = {line["case"]: line for line in lines[:6]}
    assert first["denoise"]["plan"]["topology"] == "v5e:2x2"
    assert first["denoise"]["plan"]["peak_bytes"] == 10**9
    assert first["denoise"]["measured_by_plan"] == 2 and first["decode"]["measured_by_plan"] == 4
    assert first["denoise"]["images_per_second"] == 8 and first["encode"]["host_peak_bytes"] == 7
    assert first["images_guided"]["seconds"] == 2 + 10 * 0.5 + 1
    assert first["images_plain"]["seconds"] == 2 + 10 * 0.25 + 1
    assert first["images_guided"]["of"] == ["encode", "denoise", "decode"]
    assert first["images_plain"]["images_per_second_per_device"] == pytest.approx(1 / 5.5)
    assert all("--config" in words for words in children)


def test_a_case_that_does_not_fit(script, children, capsys):
    code, lines, _ = lines_of(script, capsys, "--batches", "8,1", "--programs", "denoise,decode")
    assert code == 1
    assert [line["case"] for line in lines if "error" in line] == ["denoise", "denoise_plain"]
    assert lines[0]["error"] == "the devices have not enough memory."
    assert [line["case"] for line in lines[2:]] == ["decode", "denoise", "denoise_plain", "decode"]


@pytest.mark.parametrize(
    "device, devices, topology",
    [
        ("TPU v5 lite", 1, "v5e:1x1"),
        ("TPU v6 lite", 8, "v6e:2x4"),
        ("TPU v4", 4, "v4:2x2x1"),
        ("TPU v5 lite", 256, None),
        ("NVIDIA H100 80GB HBM3", 8, None),
        ("cpu", 1, None),
    ],
)
def test_topology_of_what_is_there(script, device, devices, topology):
    from k3jax.planning.chips import parse_slice

    assert script._topology({"device": device, "devices": devices}) == topology
    assert topology is None or parse_slice(topology).count == devices


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--batches", "0"], "--batches '0': give whole numbers of 1 or more"),
        (["--repeats", "x"], "--repeats 'x'"),
        (["--programs", "decoder"], "'decoder': choose from encode, denoise, decode"),
        (["--batch", "3"], "--batches"),
        (["--stesp", "3"], "did you mean --steps?"),
        (["--topology", "v9:1x1"], "known are v4, v5e, v5p, v6e"),
    ],
)
def test_refusals(script, capsys, words, sentence):
    code, lines, err = lines_of(script, capsys, *words)
    assert code == 2 and not lines
    assert sentence in err and len(err.splitlines()) == 1


def test_topology_without_the_compiler(script, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else find(name, *a)
    )
    code, _, err = lines_of(script, capsys, "--topology", "v5e:1x1")
    assert code == 2 and "pip install 'k3jax[tpu]'" in err


def run_script(folder, *words):
    """The lines of the script, started as a user does: in another folder, on one CPU device."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    inherited["XLA_FLAGS"] += " --xla_force_host_platform_device_count=1"
    cache = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    size = ["--height", "64", "--width", "64", "--batches", "1", "--repeats", "2"]
    done = subprocess.run(
        [sys.executable, SCRIPT, "--config", "tiny", *size, *words],
        env={**inherited, **cache, "JAX_PLATFORMS": "cpu"},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for line in lines:
        assert line["seconds"] > 0 and line["images"] == 1 and line["platform"] == "cpu"
        assert line["images_per_second"] > 0 and line["host_peak_bytes"] > 10**8
        assert "plan" not in line
    return {line["case"]: line for line in lines}


@pytest.mark.slow
def test_it_runs(tmp_path):
    lines = run_script(tmp_path)
    parts = ["encode", "denoise", "denoise_plain", "decode"]
    assert list(lines) == [*parts, "images_guided", "images_plain"]
    for name in parts:
        assert lines[name]["compile_seconds"] > 0 and lines[name]["argument_bytes"] > 0
    guided, plain = lines["images_guided"], lines["images_plain"]
    assert guided["unet_passes"] == 2 * plain["unet_passes"]
    assert guided["seconds"] > lines["denoise"]["seconds"] * guided["steps"]
