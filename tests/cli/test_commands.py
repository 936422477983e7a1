# SPDX-License-Identifier: Apache-2.0
"""`k3jax info`, `convert` and `export`."""

import json
import sys

import pytest

from k3jax.checkpoints.format import DEFAULT

import torch_checkpoints


def test_info(run, refuses, demo):
    code, lines, err = run("info", demo)
    assert code == 0 and err == []
    assert lines[0] == str(demo)
    text = "\n".join(lines)
    for words in ("random weights", "kandinsky, 25 steps", "128 x 128", "float32", "2,603,555"):
        assert words in text
    code, lines, _ = run("info", demo, "--json")
    values = json.loads("\n".join(lines))
    assert code == 0 and values["config"]["unet"]["groups"] == 16
    assert values["components"]["unet"]["parameters"] == 1_410_644
    assert values["components"]["unet"]["dtypes"] == {"float32": 1_410_644}
    assert run("info", DEFAULT, "--config", "tiny")[0] == 0
    assert "another architecture" in refuses("info", demo, "--config", "flash")


def test_info_of_a_config(run, refuses):
    code, lines, _ = run("info", "--config", "inpainting", "--json")
    components = json.loads("\n".join(lines))["components"]
    assert code == 0
    counts = {name: part["parameters"] for name, part in components.items()}
    assert counts["unet"] == 3_038_571_460 and counts["movq"] == 270_603_567
    assert "give a checkpoint" in refuses("info")
    assert "no checkpoint to verify" in refuses("info", "--config", "flash", "--verify")


def test_convert_info_export(run, refuses, tmp_path):
    source, ours = tmp_path / "source", tmp_path / "ours"
    torch_checkpoints.write_original(source)
    architecture = [
        f"--config.model.{part}.{key}={value}"
        for part, values in torch_checkpoints.ARCHITECTURE.items()
        for key, value in values.items()
    ]
    code, lines, err = run("convert", source, ours, *architecture)
    assert code == 0 and lines == [str(ours)] and err == []
    config = json.loads("\n".join(run("info", ours, "--json")[1]))["config"]
    for part, values in torch_checkpoints.ARCHITECTURE.items():
        for key, value in values.items():
            assert config[part][key] == value

    assert "exists already" in refuses("convert", source, ours, *architecture)
    shared = tmp_path / "shared"
    more = ["--text-encoder-from", ours, "--dtype", "bfloat16"]
    assert run("convert", source, shared, *architecture, *more)[0] == 0
    lines = run("info", shared, "--verify")[1]
    assert any(f"shared: {ours}" in line for line in lines)
    assert lines[-1] == "  All files are as they were written."

    code, lines, err = run("export", ours, tmp_path / "back", "--layout", "original")
    assert code == 0 and lines == [str(tmp_path / "back")] and err == []
    assert (tmp_path / "back" / "kandinsky3.pt").is_file()
    code, lines, err = run("export", ours, tmp_path / "diffusers")
    assert code == 0 and (tmp_path / "diffusers" / "model_index.json").is_file()
    assert len(err) == 1 and err[0].startswith("k3jax: warning: The weights are exact, but")

    victim = max((ours / "unet").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    code, lines, _ = run("info", ours, "--verify")
    assert code == 1 and str(victim) in "\n".join(lines) and "its checksum differs" in lines[1]
    code, lines, _ = run("info", ours, "--verify", "--json")
    assert code == 1 and len(json.loads("\n".join(lines))["faults"]) == 1
    message = refuses("generate", "a", "--checkpoint", ours, "-o", tmp_path / "out")
    assert "The unet is damaged" in message


@pytest.mark.parametrize(
    "args, message",
    [
        (["convert", "{tmp}", "{tmp}/new"], "holds no checkpoint that is known"),
        (["convert", "{tmp}/none", "{tmp}/new"], "{tmp}/none is neither a folder nor a Hugging"),
        (["convert", "{tmp}"], "the following arguments are required: DST"),
        (["export", "{tmp}", "{tmp}/new"], "{tmp} is not a k3jax checkpoint"),
        (["export", "{tmp}", "{tmp}/new", "--layout", "flax"], "--layout: invalid choice"),
        (["info", "{tmp}"], "{tmp} is not a k3jax checkpoint"),
        (["info", "{tmp}", "--verify"], "manifest.json is missing"),
        ([], "give a command: generate, img2img, inpaint, outpaint"),
        (["generat", "a"], "invalid choice: 'generat'"),
    ],
)
def test_other_commands_refuse(refuses, tmp_path, args, message):
    args = [arg.format(tmp=tmp_path) for arg in args]
    assert message.format(tmp=tmp_path) in refuses(*args)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "args, module",
    [
        (["convert", "{tmp}/a", "{tmp}/b"], "k3jax.convert.from_torch"),
        (["export", "{demo}", "{tmp}/b"], "k3jax.convert.to_torch"),
    ],
)
def test_without_torch(refuses, demo, tmp_path, monkeypatch, args, module):
    for name in ("k3jax.convert.sources", "k3jax.convert.from_torch", module):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    message = refuses(*(arg.format(tmp=tmp_path, demo=demo) for arg in args))
    assert message == "this needs torch, which is not installed: pip install 'k3jax[convert]'."


@pytest.mark.parametrize(
    "args, package, extra",
    [
        (["synthesize", "{tmp}/prompts.txt", "{tmp}/out"], "pyarrow", "synth"),
        (["verify", "{tmp}"], "pyarrow", "synth"),
        (["regenerate", "{tmp}", "a", "--output", "{tmp}/out"], "fsspec", "synth"),
        (["gallery", "{tmp}"], "pyarrow", "synth"),
        (["train", "--config", "tiny"], "grain", "train"),
        (["train", "--config", "tiny"], "pyarrow", "train"),
        (["synthesize", "gs://none/prompts.txt", "{tmp}/out"], "gcsfs", "gcs"),
        (["synthesize", "gs://none/*.txt", "{tmp}/out"], "gcsfs", "gcs"),
        (["verify", "gs://none/out"], "gcsfs", "gcs"),
    ],
)
def test_a_missing_extra_is_named_before_any_work(run, tmp_path, monkeypatch, args, package, extra):
    (tmp_path / "prompts.txt").write_text("a circle\n")
    monkeypatch.setitem(sys.modules, package, None)
    code, out, err = run(*(arg.format(tmp=tmp_path) for arg in args))
    assert code == 2 and not out
    sentence = f"this needs {package}, which is not installed: pip install 'k3jax[{extra}]'."
    assert err[-1] == f"k3jax: error: {sentence}"
    assert not (tmp_path / "out").exists()
