# SPDX-License-Identifier: Apache-2.0
"""The command line: what it makes, what it says, and how it refuses."""

import json
import os
import pathlib
import subprocess
import sys
import threading
import warnings

import jax
import numpy as np
import pytest
import torch_checkpoints
from PIL import Image

from k3jax.cli import generate
from k3jax.cli.demo_checkpoint import demo_checkpoint
from k3jax.cli.output import PlannedImage
from k3jax.cli.main import main, split_overrides
from k3jax.compilation_cache import enable_compilation_cache
from k3jax.images import read_settings
from k3jax.pipeline import Kandinsky3Pipeline


SMALL = ["--steps", "2", "--height", "64", "--width", "64", "--dtype", "float32"]
HEAVY = ("jax", "torch", "transformers", "ml_collections", "orbax", "flax")


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A user's cache folder of this test session."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def demo(cache):
    """The demo checkpoint, asked for by two at once."""
    found = []
    threads = [threading.Thread(target=lambda: found.append(demo_checkpoint())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    return found[0]


@pytest.fixture
def run(capsys, cache):
    """main() -> (exit code, lines of stdout, lines of stderr)."""

    def call(*args):
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return call


@pytest.fixture
def asked(monkeypatch):
    """What `generate` would make: the arguments of make_images, which is not run."""
    from k3jax.cli import batches

    calls = []
    monkeypatch.setattr(batches, "make_images", lambda *args, **kwargs: calls.append(args))
    return calls


def refuses(run, *args):
    """The one line with which main() refuses."""
    code, out, err = run(*args)
    assert code == 2 and not out
    assert len(err) == 1 and err[0].startswith("k3jax: error: "), err
    return err[0].removeprefix("k3jax: error: ")


# --- generate --------------------------------------------------------------------------------------


def test_generate(run, demo, tmp_path):
    (tmp_path / "prompts.txt").write_text("рыжий кот\n\n  a blue square \r\n")
    out = tmp_path / "out"
    code, paths, err = run(
        *("generate", "a red circle", "--prompts-file", tmp_path / "prompts.txt", "-n", "2"),
        *("--checkpoint", demo, "--seed", "7", "-o", out, *SMALL),
    )
    assert code == 0 and err == []
    names = [
        "0000_seed7_a-red-circle.png",
        "0001_seed8_a-red-circle.png",
        "0002_seed9_рыжий-кот.png",
        "0003_seed10_рыжий-кот.png",
        "0004_seed11_a-blue-square.png",
        "0005_seed12_a-blue-square.png",
        "contact_sheet.png",
    ]
    assert paths == [str(out / name) for name in names]
    assert sorted(p.name for p in out.iterdir()) == names
    pixels = [np.asarray(Image.open(out / name)) for name in names[:-1]]
    assert {p.shape for p in pixels} == {(64, 64, 3)}
    assert len({p.tobytes() for p in pixels}) == 6

    settings = read_settings(out / names[3])
    assert settings["call"]["prompt"] == "рыжий кот" and settings["call"]["seed"] == 10
    assert settings["dtype"] == "float32" and settings["sampler"]["num_inference_steps"] == 2
    assert len(settings["checkpoint"]["fingerprint"]) == 64
    pipe = Kandinsky3Pipeline.from_pretrained(demo, dtype=settings["dtype"])
    (again,) = pipe(**settings["call"]).images
    np.testing.assert_array_equal(np.asarray(again), pixels[3])

    # What is there is not replaced, and a contact sheet never.
    same = ["generate", "a red circle", "-n", "2", "--checkpoint", demo, "--seed", "7", "-o", out]
    message = refuses(run, *same, *SMALL)
    assert "a-red-circle.png exists already (and 1 more)" in message and "--overwrite" in message
    code, paths, err = run(*same, *SMALL, "--overwrite")
    assert code == 0 and paths[-1] == str(out / "contact_sheet_2.png")
    np.testing.assert_array_equal(np.asarray(Image.open(paths[0])), pixels[0])


def test_generate_end_to_end_without_a_checkpoint(demo, tmp_path):
    """As a person would, in a process of its own: one image, a long prompt, a file as output."""
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",  # as in this process, for the compiled programs
    }
    prompt = "a red circle " * 800
    command = [sys.executable, "-m", "k3jax", "generate", prompt, "-o", "circle.png", *SMALL]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "circle.png\n"
    assert [p.name for p in tmp_path.iterdir()] == ["circle.png"]
    assert read_settings(tmp_path / "circle.png")["call"]["prompt"] == prompt
    notes = [line for line in done.stderr.splitlines() if line.startswith("k3jax:")]
    assert len(notes) == 2, done.stderr
    assert "its pictures mean nothing" in notes[0] and "k3jax convert" in notes[0]
    assert notes[1].startswith("k3jax: warning: prompt 0 has 10401 tokens and the model sees 128")


def test_flags_win_over_overrides_and_these_over_the_config(run, demo, asked, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "from k3jax.configs.tiny import get_config as tiny\n"
        "def get_config():\n"
        "    config = tiny()\n"
        f"    config.checkpoint = {str(demo)!r}\n"
        "    config.model.sampler.eta = 0.25\n"
        "    config.generate = dict(seed=1, height=128, width=128, negative_prompt='dull')\n"
        "    return config\n"
    )
    code, _, err = run(
        *("generate", "a", "--config", file, "--config.generate.height=192", "-o", tmp_path / "o"),
        *("--config.generate.seed", "2", "--seed", "3", "--steps", "5", "b"),
    )
    assert code == 0, err
    ((checkpoint, config, _, call, images, _),) = asked
    assert checkpoint.path == demo and config.generate.seed == 3
    assert (call["height"], call["width"], call["eta"]) == (192, 128, 0.25)
    assert (call["negative_prompt"], call["num_inference_steps"]) == ("dull", 5)
    assert [(i.prompt, i.seed) for i in images] == [("a", 3), ("b", 4)]


def test_a_checkpoint_has_its_own_defaults(run, demo, asked, tmp_path):
    assert run("generate", "a", "--checkpoint", demo, "-o", tmp_path / "o")[0] == 0
    ((_, config, mesh, call, _, _),) = asked
    assert (call["height"], call["num_inference_steps"], call["sampler"]) == (128, 25, "kandinsky")
    assert config.pipeline.dtype == "bfloat16" and mesh.shape["data"] == len(jax.devices())


def test_a_sampler_that_makes_other_steps_says_so(run, demo, asked, tmp_path):
    _, _, err = run("generate", "a", "--checkpoint", demo, "-o", tmp_path, "--sampler", "flash")
    assert err == ["k3jax: warning: the sampler flash makes 4 steps where 25 were asked for."]


def test_a_long_negative_prompt_is_named(demo):
    from k3jax.cli.batches import _warn_of_cuts
    from k3jax.tokenizer import Tokenizer

    class Pipe:
        tokenizer = Tokenizer(demo / "tokenizer")

    images = [PlannedImage(pathlib.Path("a.png"), "y" * n, 0) for n in (5, 5, 150)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _warn_of_cuts(Pipe, images, "x" * 200)
    assert [str(w.message).split(";")[0] for w in caught] == [
        "prompt 1 has 151 tokens and the model sees 128",
        "the negative prompt has 201 tokens and the model sees 128",
    ]


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "give at least one prompt, or --prompts-file FILE."),
        (["--prompts-file", "{tmp}/none.txt"], "the file of prompts {tmp}/none.txt does not exist"),
        (["--prompts-file", "{tmp}/empty.txt"], "{tmp}/empty.txt holds none"),
        (["--prompts-file", "{tmp}/control.txt"], "control.txt, line 3: has the control char"),
        (["--prompts-file", "{tmp}/latin.txt"], "latin.txt, line 2: byte 4 is not UTF-8"),
        (["bad \x07 prompt"], "prompt 0 has the control character U+0007 at position 4"),
        (["a", "--negative-prompt", "\x1b"], "the negative prompt: has the control character"),
        (["a", "--height", "100"], "height is 100; it must be a positive multiple of 64"),
        (["a", "--width", "-64"], "width is -64; it must be a positive multiple of 64"),
        (["a", "--steps", "0"], "num_inference_steps is 0; it must be between 1 and 1000"),
        (["a", "--eta", "2"], "eta is 2.0; it must be between 0 and 1"),
        (["a", "--guidance-scale", "-1"], "guidance_scale is -1.0; it must be 0 or more"),
        (["a", "--guidance-interval", "3", "1"], "guidance_interval is (3, 1)"),
        (["a", "--seed", "-1"], "seed -1 is not between 0 and 2^64 - 1"),
        (["a", "-n", "0"], "--num-images is 0; it must be 1 or more"),
        (["a", "--mesh", "data=3"], "mesh 'data=3' takes 3 devices, but there are"),
        (["a", "--mesh", "rows=2"], "'rows=2' is not AXIS=SIZE with AXIS one of data, fsdp"),
        (["a", "--batch-size", "3"], "batch_size is 3, but the mesh splits a batch over"),
        (["a", "--output", "{tmp}/empty.txt/out"], "cannot be written: Not a directory"),
        (["a", "--output", "gs://bucket/out"], "gs://bucket/out is not on this machine"),
        (["a", "b", "--output", "{tmp}/one.png"], "one.png is one file, but there are 2 images"),
        (["a", "--output", "{tmp}/there.png"], "there.png exists already: choose another"),
        (["a", "--checkpoint", "{tmp}/none"], "There is no checkpoint at {tmp}/none"),
        (["a", "--checkpoint", "{tmp}"], "{tmp} is not a k3jax checkpoint: it has no config.json"),
        (["a", "--config", "tini"], "there is no config 'tini' (did you mean 'tiny'?)"),
        (["a", "--config.generate.hight=64"], "(did you mean --config.generate.height?)"),
        (["a", "--config.generate.height"], "--config.generate.height needs a value"),
        (["a", "--config", "kandinsky3"], "weights/kandinsky3"),
        (
            ["a", "--config", "tiny", "--config.model.unet.groups=8"],
            "is of another architecture than the config: unet.groups is 16 (config: 8)",
        ),
        (["a", "--stesp", "4"], "generate has no argument '--stesp' (did you mean --steps?)"),
        (["a", "--steps", "four"], "invalid int value: 'four' (see `k3jax generate --help`)"),
        (["a", "--sampler", "euler"], "argument --sampler: invalid choice: 'euler'"),
        (["a", "--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
    ],
)
def test_generate_refuses(run, demo, tmp_path, args, message):
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "control.txt").write_bytes(b"good\n\nbad \x00 line\n")
    (tmp_path / "latin.txt").write_bytes(b"good\ncaf\xe9\n")
    (tmp_path / "there.png").touch()
    args = [arg.format(tmp=tmp_path) for arg in args]
    if "--checkpoint" not in args and "--config" not in args:
        args += ["--checkpoint", str(demo)]
    if "--output" not in args:
        args += ["--output", str(tmp_path / "out")]
    assert message.format(tmp=tmp_path) in refuses(run, "generate", *args)
    assert not (tmp_path / "out").exists()


def test_inpainting_checkpoints_cannot_make_images_of_prompts(run, demo, monkeypatch, tmp_path):
    override = "--config.model.unet.in_channels=9"
    monkeypatch.setattr(generate, "architecture_differences", lambda *args: None)
    message = refuses(run, "generate", "a", "--checkpoint", demo, override, "-o", tmp_path / "out")
    assert "9 input channels: it is for inpainting" in message


# --- info, convert, export -------------------------------------------------------------------------


def test_info(run, demo):
    code, lines, err = run("info", demo)
    assert code == 0 and err == []
    assert lines[0] == str(demo)
    text = "\n".join(lines)
    for words in ("random weights", "kandinsky, 25 steps", "128 x 128", "float32", "6,969,571"):
        assert words in text
    code, lines, _ = run("info", demo, "--json")
    values = json.loads("\n".join(lines))
    assert code == 0 and values["config"]["unet"]["groups"] == 16
    assert values["components"]["unet"]["parameters"] == 5_776_660
    assert values["components"]["unet"]["dtypes"] == {"float32": 5_776_660}
    assert run("info", demo, "--config", "tiny")[0] == 0
    assert "another architecture" in refuses(run, "info", demo, "--config", "flash")


def test_info_of_a_config(run):
    code, lines, _ = run("info", "--config", "inpainting", "--json")
    components = json.loads("\n".join(lines))["components"]
    assert code == 0
    counts = {name: part["parameters"] for name, part in components.items()}
    assert counts["unet"] == 3_038_571_460 and counts["movq"] == 270_603_567
    assert "give a checkpoint" in refuses(run, "info")
    assert "no checkpoint to verify" in refuses(run, "info", "--config", "flash", "--verify")


def test_convert_info_export(run, tmp_path):
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

    assert "exists already" in refuses(run, "convert", source, ours, *architecture)
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
    assert code == 1 and str(victim) in "\n".join(lines) and "sha256 differs" in lines[1]
    code, lines, _ = run("info", ours, "--verify", "--json")
    assert code == 1 and len(json.loads("\n".join(lines))["faults"]) == 1
    message = refuses(run, "generate", "a", "--checkpoint", ours, "-o", tmp_path / "out")
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
        ([], "give a command: generate, info, convert, export"),
        (["generat", "a"], "invalid choice: 'generat'"),
    ],
)
def test_other_commands_refuse(run, tmp_path, args, message):
    args = [arg.format(tmp=tmp_path) for arg in args]
    assert message.format(tmp=tmp_path) in refuses(run, *args)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "args, module",
    [
        (["convert", "{tmp}/a", "{tmp}/b"], "k3jax.convert.from_torch"),
        (["export", "{demo}", "{tmp}/b"], "k3jax.convert.to_torch"),
    ],
)
def test_without_torch(run, demo, tmp_path, monkeypatch, args, module):
    for name in ("k3jax.convert.sources", "k3jax.convert.from_torch", module):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    message = refuses(run, *(arg.format(tmp=tmp_path, demo=demo) for arg in args))
    assert message == "this needs torch, which is not installed: pip install 'k3jax[convert]'."


# --- the frame -------------------------------------------------------------------------------------


def test_help_and_usage_errors_import_nothing_heavy():
    script = f"""
import contextlib, io, sys, time
start = time.perf_counter()
from k3jax.cli.output import PlannedImage
from k3jax.cli.main import main
for args in ([], ["generate"], ["info"], ["convert"], ["export"]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main([*args, "--help"])
        except SystemExit as end:
            assert end.code == 0
    assert "--config" in out.getvalue()
assert main(["generate", "a", "--stesp", "3"]) == 2
assert main(["generate", "a", "--config.generate.sede=3"]) == 2
assert main(["info"]) == 2
heavy = [name for name in {HEAVY} if name in sys.modules]
assert not heavy, heavy
print(f"{{time.perf_counter() - start:.2f}} s")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print("all helps together:", done.stdout)


@pytest.mark.parametrize(
    "error, expected",
    [
        (KeyboardInterrupt(), (130, "k3jax: interrupted.")),
        (OSError(28, "No space left on device", "/x"), (2, "/x: No space left on device.")),
        (ValueError("line one\n  line two"), (2, "k3jax: error: line one line two")),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), (2, "have not enough memory")),
    ],
)
def test_errors_are_one_line(run, monkeypatch, error, expected):
    def fail(args):
        raise error

    monkeypatch.setattr(generate, "run", fail)
    code, _, err = run("generate", "a")
    assert code == expected[0] and len(err) == 1 and expected[1] in err[0]
    if isinstance(error, ValueError):
        assert "K3JAX_TRACEBACK=1" in err[0]  # raised outside of k3jax: perhaps a defect of ours
        monkeypatch.setenv("K3JAX_TRACEBACK", "1")
        assert any("in fail" in line for line in run("generate", "a")[2])


def test_defects_keep_their_traceback(run, monkeypatch):
    def fail(args):
        raise TypeError("a defect")

    monkeypatch.setattr(generate, "run", fail)
    with pytest.raises(TypeError, match="a defect"):
        run("generate", "a")


def test_overrides_are_split_off():
    words = ["a", "--config.b.c=1=2", "--config", "d", "--config.e", "-1", "--", "--config.f=3"]
    assert split_overrides(words) == (
        ["a", "--config", "d", "--", "--config.f=3"],
        [("b.c", "1=2"), ("e", "-1")],
    )


def test_the_demo_is_written_once_and_mended(demo):
    (demo / "manifest.json").write_text("{")
    before = (demo / "unet").stat().st_ino
    assert demo_checkpoint() == demo
    mended = (demo / "unet").stat().st_ino
    assert demo_checkpoint() == demo
    assert before != mended == (demo / "unet").stat().st_ino


def test_a_cache_that_cannot_be_written(run, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    message = refuses(run, "generate", "a", "-o", tmp_path / "out")
    assert "XDG_CACHE_HOME" in message and "--checkpoint DIR" in message


def test_compilation_cache(tmp_path, monkeypatch):
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    assert enable_compilation_cache() == before["jax_compilation_cache_dir"]
    assert {name: getattr(jax.config, name) for name in names} == before
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv("K3JAX_COMPILATION_CACHE", "0")
        assert enable_compilation_cache() is None
        monkeypatch.delenv("K3JAX_COMPILATION_CACHE")
        assert enable_compilation_cache() == str(tmp_path / "k3jax" / "xla")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "k3jax" / "xla")
        assert pathlib.Path(tmp_path / "k3jax" / "xla").stat().st_mode & 0o777 == 0o700
        jax.config.update("jax_compilation_cache_dir", None)
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert enable_compilation_cache() is None
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
