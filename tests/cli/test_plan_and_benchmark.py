# SPDX-License-Identifier: Apache-2.0
"""`k3jax plan` up to where the compiler starts, and `k3jax benchmark`."""

import importlib.util
import json
from pathlib import Path

import pytest

from k3jax.cli.run_config import build, collect
from k3jax.config import ModelConfig
from k3jax.planning import compiler
from k3jax.planning import measurement as benchmark
from k3jax.planning.workload import weight_bytes


CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def no_compiler(monkeypatch):
    """libtpu is not there."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else find(name, *a)
    )


def test_plan_without_the_compiler(refuses, no_compiler):
    message = refuses("plan", "--topology", "v5e:2x4", "--config", "tiny")
    assert "pip install 'k3jax[tpu]'" in message


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "give a slice with --topology"),
        (("--topology", "v9:2x2"), "known are v4, v5e, v5p, v6e"),
        (("--topology", "v5e:5x5"), "do not make up a side of 5"),
        (("--topology", "v5e:2x2", "--height", "65"), "multiple of 32"),
        (("--topology", "v5e:2x2", "--steps", "0"), "num_inference_steps is 0"),
        (("--topology", "v5e:2x2", "--guidance-interval", "5", "2"), "guidance_interval"),
        (("--topology", "v5e:2x2", "--price-per-chip-hour", "-1"), "--price-per-chip-hour is -1"),
        (("--topology", "v5e:2x2", "--programs", "decoder"), "choose of encode, denoise, decode"),
        (("--topology", "v5e:2x2", "--batch", "0"), "--batch is 0"),
        (("--topology", "v5e:2x2", "--mesh", "data=3"), "choose sizes whose product is 4"),
        (("--topology", "v5e:2x2", "--checkpoint", "nowhere"), "nowhere"),
    ],
)
def test_plan_refuses(refuses, monkeypatch, arguments, words):
    monkeypatch.setattr(compiler, "check_libtpu", lambda: None)
    config = () if "--checkpoint" in arguments else ("--config", "tiny")
    assert words in refuses("plan", *config, *arguments)


def test_the_full_size_encoder_does_not_fit_one_chip(refuses, monkeypatch):
    monkeypatch.setattr(compiler, "check_libtpu", lambda: None)
    assert "17.4 GB of the 16.9 GB" in refuses("plan", "--topology", "v5e:1x1")


@pytest.fixture
def asked(run, monkeypatch):
    """Runs `k3jax plan` up to the compiler; returns the program and the work that come first."""
    reached = []

    def compile_in_child(program, work, where, say):
        reached.append((program, work))
        raise ValueError("this is as far as it goes")

    def plan(*arguments):
        code, _, err = run("plan", "--no-progress", *arguments)
        assert code == 2 and reached, err
        return reached[0]

    monkeypatch.setattr(compiler, "check_libtpu", lambda: None)
    monkeypatch.setattr(compiler, "compile_in_child", compile_in_child)
    return plan


def test_in_int8_it_does(asked):
    program, work = asked("--topology", "v5e:1x1", "--int8-text-encoder")
    assert program == "encode" and work.int8_text_encoder
    assert 8.6e9 < weight_bytes("text_encoder", work) < 9.0e9


CHIPS = {"v5e_1": "v5e:1x1", "v5e_256": "v5e:16x16", "v6e_8": "v6e:2x4", "h100_8": "v5p:2x2x2"}
"""Of a machine without TPUs: one with as many chips, as large."""


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in CONFIGS.glob("*/*.py") if path.stem != "__init__")
)
def test_every_config_can_be_planned(asked, name):
    values = collect(name)
    _, work = asked("--topology", CHIPS.get(name, "v5e:2x4"), "--config", name)
    # Kandinsky 3's own where a config has no model.
    model = build(values).model if values.get("model") else ModelConfig()
    assert work.model.unet == model.unet


def test_a_compiler_that_crashes(run, monkeypatch, tmp_path):
    monkeypatch.setattr(compiler, "check_libtpu", lambda: None)
    # A child that dies as libtpu does on some shapes.
    script = tmp_path / "dies.sh"
    script.write_text("#!/bin/sh\necho 'E0000 something internal' >&2\nkill -SEGV $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(compiler.sys, "executable", str(script))
    code, out, err = run("plan", "--topology", "v5e:2x2", "--config", "tiny")
    assert code == 2 and not out
    assert "crashed with SIGSEGV" in err[-1] and "something internal" in err[-1]
    assert run("plan", "--topology", "v5e:2x2", "--config", "tiny", "--no-progress")[2] == err[-1:]


def check_lines(lines, cases, data=4, tensor=2):
    values = [json.loads(line) for line in lines]
    assert [line["case"] for line in values] == [*cases, "total"]
    for line in values:
        assert line["seconds"] > 0 and line["platform"] == "cpu"
        assert line["images"] == data and line["devices"] == data * tensor
        assert line["mesh"] == {"data": data, "fsdp": 1, "tensor": tensor}
    for line in values[:-1]:
        assert line["compile_seconds"] > 0 and line["fastest"] <= line["seconds"]
        assert line["argument_bytes"] > 0
    return values


SMALL = ("--height", 64, "--width", 64, "--repeats", 2, "--mesh", "data=4,tensor=2")


@pytest.mark.usefixtures("one_device")
def test_benchmark(run, refuses):
    code, lines, err = run("benchmark", *SMALL, "--mesh", "data=1", "--programs", "encode")
    assert code == 0 and err == []
    encode, total = check_lines(lines, ["encode"], data=1, tensor=1)
    assert total["seconds"] == encode["seconds"]
    assert "--repeats is 0" in refuses("benchmark", "--repeats", 0)


def test_benchmark_of_whole_images(run, monkeypatch):
    seconds = {"encode": 1.0, "denoise": 0.5, "denoise_plain": 0.25, "decode": 2.0}

    def measure(name, work, mesh, repeats):
        times = {"seconds": seconds[name], "fastest": seconds[name], "compile_seconds": 1.0}
        return {"case": name, "images": work.images, "argument_bytes": 1, **times}

    monkeypatch.setattr(benchmark, "measure", measure)
    interval = ("--guidance-interval", 0, 9, "--steps", 25)
    total = check_lines(run("benchmark", *SMALL, *interval)[1], seconds)[-1]
    assert total["seconds"] == pytest.approx(1 + 10 * 0.5 + 15 * 0.25 + 2)
    assert total["unet_passes"] == 35 and total["steps"] == 25
    flash = run("benchmark", *SMALL, "--sampler", "flash")[1]
    total = check_lines(flash, ["encode", "denoise_plain", "decode"])[-1]
    assert total["seconds"] == pytest.approx(1 + 4 * 0.25 + 2)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_benchmark_runs_all_programs(run):
    fewer = ("--config", "tiny", "--config.model.unet.block_out_channels=32,64")  # to compile
    interval = ("--mesh", "data=1", "--guidance-interval", 0, 9)
    code, lines, err = run("benchmark", *SMALL, *fewer, *interval)
    assert code == 0 and err == []
    check_lines(lines, ["encode", "denoise", "denoise_plain", "decode"], data=1, tensor=1)
