# SPDX-License-Identifier: Apache-2.0
"""`k3jax generate`: its files, its messages, and what it refuses."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from k3jax import Kandinsky3Pipeline
from k3jax.checkpoints.format import read_checkpoint
from k3jax.checkpoints.lora_files import load_lora, save_lora
from k3jax.cli import inputs
from k3jax.cli.inputs import NOTE
from k3jax.config import LoraConfig, to_dict
from k3jax.images.pngs import read_settings
from k3jax.model.abstract import abstract_module
from k3jax.pipelines.option_fields import option_fields
from k3jax.pipelines.options import TextToImageOptions
from k3jax.training.tasks.lora_finetuning import init_lora

from random_checkpoint import MODEL


SMALL = ["--steps", "2", "--height", "64", "--width", "64", "--dtype", "float32"]


@pytest.mark.usefixtures("one_device")
def test_generate(run, refuses, tmp_path):
    """The files of the packaged model, which is used without --checkpoint."""
    (tmp_path / "prompts.txt").write_text("рыжий кот\n\n  a blue square \r\n")
    out = tmp_path / "out"
    code, paths, err = run(
        *("generate", "a red circle", "--prompts-file", tmp_path / "prompts.txt", "-n", "2"),
        *("--seed", "7", "--negative-prompt", "dull", "-o", out, *SMALL),
    )
    assert code == 0 and err == [NOTE]
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
    assert settings["checkpoint"]["fingerprint"] == read_checkpoint("tiny").fingerprint
    pipe = Kandinsky3Pipeline.from_pretrained("tiny", dtype=settings["dtype"])
    (again,) = pipe(**settings["call"], progress_bar=False).images
    np.testing.assert_array_equal(np.asarray(again), pixels[3])

    # An image is replaced only with --overwrite, and a contact sheet never.
    same = ["generate", "a red circle", "-n", "2", "--seed", "7", "-o", out, *SMALL]
    message = refuses(*same)
    assert "a-red-circle.png exists already (and 1 more)" in message and "--overwrite" in message
    code, paths, err = run(*same, "--negative-prompt", "dull", "--overwrite")
    assert code == 0 and paths[-1] == str(out / "contact_sheet_2.png")
    np.testing.assert_array_equal(np.asarray(Image.open(paths[0])), pixels[0])


def test_every_option_is_recorded(run, demo, planned, tmp_path):
    """Everything that an image depends on is in its PNG, also options that come later."""
    assert run("generate", "a", "--checkpoint", demo, "-o", tmp_path / "o")[0] == 0
    ((image_run, *_),) = planned
    options = {name for name, option in option_fields(TextToImageOptions).items() if option.group}
    assert image_run._call_settings().keys() == options - {"seed", "num_images_per_prompt"}


def test_every_option_has_a_flag_and_a_config_key(run, demo, planned, tmp_path):
    values = {int: ["3"], float: ["0.5"], str: ["x"]}
    more = {"height": ["64"], "width": ["64"], "guidance_interval": ["1", "2"]}
    for name, option in option_fields(TextToImageOptions).items():
        if option.flags:
            words = more.get(name) or option.choices[-1:] or values[option.type]
            args = ["generate", "a", "--checkpoint", demo, "-o", tmp_path / name]
            assert run(*args, option.flags[0], *words)[0] == 0, name
            assert run(*args, f"--config.generate.{name}={','.join(words)}")[0] == 0, name
            by_flag, by_key = (getattr(run.options, name) for run, *_ in planned[-2:])
            assert by_flag == by_key != option.default, name


@pytest.mark.slow
def test_generate_in_a_process_of_its_own(tmp_path):
    """As a person would: one image, a long prompt, a file as output."""
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
    assert notes[0] == NOTE
    assert notes[1].startswith("k3jax: warning: prompt 0 has 2402 tokens and the model sees 128")


def test_flags_win_over_overrides_and_these_over_the_config(run, demo, planned, tmp_path):
    file = tmp_path / "own.py"
    model = to_dict(MODEL)
    model["sampler"]["eta"] = 0.25
    file.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    config = ConfigDict()\n"
        f"    config.checkpoint = {str(demo)!r}\n"
        f"    config.model = {model!r}\n"
        "    config.generate = dict(seed=1, height=128, width=128, negative_prompt='dull')\n"
        "    return config\n"
    )
    code, _, err = run(
        *("generate", "a", "--config", file, "--config.generate.height=192", "-o", tmp_path / "o"),
        *("--config.generate.seed", "2", "--seed", "3", "--steps", "5", "b"),
    )
    assert code == 0, err
    ((image_run, images),) = planned
    call = image_run._call_settings()
    assert image_run.checkpoint.path == demo and image_run.options.seed == 3
    assert (call["height"], call["width"], call["eta"]) == (192, 128, 0.25)
    assert (call["negative_prompt"], call["num_inference_steps"]) == ("dull", 5)
    assert [(i.prompt, i.seed) for i in images] == [("a", 3), ("b", 4)]


def test_a_checkpoint_has_its_own_defaults(run, demo, planned, tmp_path):
    assert run("generate", "a", "--checkpoint", demo, "-o", tmp_path / "o")[0] == 0
    ((image_run, *_),) = planned
    call = image_run._call_settings()
    assert (call["height"], call["num_inference_steps"], call["sampler"]) == (128, 25, "kandinsky")
    assert image_run.load.dtype == "bfloat16"
    assert image_run.load.mesh.shape["data"] == len(jax.devices())


def test_a_sampler_that_runs_other_steps_warns(run, demo, planned, tmp_path):
    _, _, err = run("generate", "a", "--checkpoint", demo, "-o", tmp_path, "--sampler", "flash")
    assert err == ["k3jax: warning: the sampler flash makes 4 steps where 25 were asked for."]
    _, _, err = run("generate", "a", "--checkpoint", demo, "-o", tmp_path, "--steps", "999")
    assert err == [
        "k3jax: warning: the sampler kandinsky makes 500 steps where 999 were asked for."
    ]


@pytest.mark.slow
def test_a_warning_is_printed_once_for_all_batches(run, demo, tmp_path):
    small = ("--height", "64", "--width", "64", "--sampler", "flash", "--steps", "2")
    code, paths, err = run("generate", "a", "b", "--checkpoint", demo, "-o", tmp_path / "o", *small)
    assert code == 0 and len(paths) == 3
    assert err == ["k3jax: warning: the sampler flash makes 4 steps where 2 were asked for."]


@pytest.mark.usefixtures("one_device")
def test_long_prompts_are_reported_once(run, tmp_path):
    """The number of a prompt is that of the command line, in whatever batch it is."""
    long = "a red circle " * 50
    code, paths, err = run(
        *("generate", "a star", long, "--negative-prompt", long, "-n", "2"),
        *("--checkpoint", "tiny", "-o", tmp_path, *SMALL),
    )
    assert code == 0 and len(paths) == 5
    assert [line.split(";")[0] for line in err] == [
        "k3jax: warning: prompt 1 has 152 tokens and the model sees 128",
        "k3jax: warning: negative_prompt has 152 tokens and the model sees 128",
    ]


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "give at least one prompt, or --prompts-file FILE."),
        (["--prompts-file", "{tmp}/none.txt"], "file of prompts {tmp}/none.txt does not exist"),
        (["--prompts-file", "{tmp}/empty.txt"], "{tmp}/empty.txt holds none"),
        (["--prompts-file", "{tmp}/control.txt"], "control.txt, line 3 has the control char"),
        (["--prompts-file", "{tmp}/latin.txt"], "latin.txt, line 2: byte 4 is not UTF-8"),
        (["bad \x07 prompt"], "prompt 0 has the control character U+0007 at position 4"),
        (["a", "--negative-prompt", "\x1b"], "negative_prompt has the control character"),
        (["a", "--height", "100"], "height is 100; it must be a positive multiple of 16"),
        (["a", "--height", "0"], "height is 0; it must be a positive multiple of 16"),
        (["a", "--width", "-64"], "width is -64; it must be a positive multiple of 16"),
        (["a", "--steps", "0"], "num_inference_steps is 0; it must be 1 or more"),
        (["a", "--eta", "2"], "eta is 2.0; it must be between 0 and 1"),
        (["a", "--guidance-scale", "-1"], "guidance_scale is -1.0; it must be 0 or more"),
        (["a", "--guidance-interval", "3", "1"], "guidance_interval is (3, 1)"),
        (["a", "--seed", "-1"], "seed -1 is not between 0 and 2^64 - 1"),
        (["a", "-n", "0"], "num_images_per_prompt is 0; it must be 1 or more"),
        (["a", "--mesh", "data=3"], "mesh 'data=3' takes 3 devices, but there are"),
        (["a", "--mesh", "rows=2"], "'rows=2' is not AXIS=SIZE with AXIS one of data, fsdp"),
        (["a", "--batch-size", "3"], "batch_size is 3, but the mesh splits a batch over"),
        (["a", "--batch-size", "0"], "batch_size is 0; it must be 1 or more"),
        (["a", "--guidance-interval", "20", "30"], "of 25 steps, within (0, 24)"),
        (["a", "--sampler", "dpm++2m", "--steps", "1000"], "ask for fewer steps (998 is the most"),
        (
            ["a", "--height", "999936", "--width", "999936"],
            "not even one image fits: choose a smaller",
        ),
        (["a", "--distributed-timeout", "0"], "--distributed-timeout is 0.0; it must be 1 or more"),
        (["a", "--output", "{tmp}/empty.txt/out"], "cannot be written: Not a directory"),
        (["a", "--output", "gs://bucket/out"], "gs://bucket/out is not on this machine"),
        (["a", "b", "--output", "{tmp}/one.png"], "one.png is one file, but there are 2 images"),
        (["a", "--output", "{tmp}/there.png"], "there.png exists already: choose another"),
        (["a", "--checkpoint", "{tmp}/none"], "There is no checkpoint at {tmp}/none"),
        (["a", "--checkpoint", "{tmp}"], "{tmp} is not a k3jax checkpoint: it has no config.json"),
        (["a", "--config", "tini"], "there is no config 'tini' (did you mean 'tiny'?)"),
        (["a", "--config.generate.hight=64"], "(did you mean --config.generate.height?)"),
        (["a", "--config.generate.height"], "--config.generate.height needs a value"),
        (["a", "--config", "flash"], "the config's checkpoint weights/flash does not exist"),
        (
            ["a", "--config", "tiny", "--config.model.unet.groups=16"],
            "is of another architecture than the config: unet.groups is 8 (config: 16)",
        ),
        (
            ["a", "--lora", "{tmp}/none"],
            "There is no LoRA at {tmp}/none: the folder does not exist",
        ),
        (["a", "--lora-scale", "0.5"], "--lora-scale is the strength of a LoRA"),
        (["a", "--stesp", "4"], "generate has no argument '--stesp' (did you mean --steps?)"),
        (["a", "--steps", "four"], "invalid int value: 'four' (see `k3jax generate --help`)"),
        (["a", "--sampler", "euler"], "argument --sampler: invalid choice: 'euler'"),
        (["a", "--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
    ],
)
def test_generate_refuses(refuses, demo, tmp_path, args, message):
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "control.txt").write_bytes(b"good\n\nbad \x00 line\n")
    (tmp_path / "latin.txt").write_bytes(b"good\ncaf\xe9\n")
    (tmp_path / "there.png").touch()
    args = [arg.format(tmp=tmp_path) for arg in args]
    if "--checkpoint" not in args and "--config" not in args:
        args += ["--checkpoint", str(demo)]
    if "--output" not in args:
        args += ["--output", str(tmp_path / "out")]
    assert message.format(tmp=tmp_path) in refuses("generate", *args)
    assert not (tmp_path / "out").exists()


def test_inpainting_checkpoints_cannot_make_images_of_prompts(refuses, demo, monkeypatch, tmp_path):
    override = "--config.model.unet.in_channels=9"
    monkeypatch.setattr(inputs, "architecture_differences", lambda *args: None)
    message = refuses("generate", "a", "--checkpoint", demo, override, "-o", tmp_path / "out")
    assert "this is an inpainting checkpoint (its U-Net takes 9 channels" in message


@pytest.fixture
def lora(demo, tmp_path):
    """Function that writes a LoRA of `demo` with changed weights; returns its folder."""
    checkpoint, config = read_checkpoint(demo), LoraConfig(rank=2)

    def write(change=lambda weights: None):
        weights = init_lora(abstract_module("unet", checkpoint.config), config)
        for pair in weights.values():
            pair["b"] += 0.1
        change(weights)
        folder = tmp_path / "lora"
        save_lora(folder, weights, config, checkpoint.fingerprint, overwrite=folder.exists())
        return folder

    return write


LAYER = "context_pooling.attention.to_q"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda weights: weights[LAYER]["a"].__setitem__((0, 0), np.nan), "NaN or infini"),
        (lambda weights: weights.pop(LAYER), "for another architecture than this U-Net's; 1 miss"),
    ],
)
def test_loras_that_do_not_fit(refuses, demo, lora, tmp_path, change, message):
    args = ["generate", "a", "--checkpoint", demo, "--lora", lora(change)]
    refusal = refuses(*args, "-o", tmp_path / "b.png", *SMALL)
    assert LAYER in refusal and message in refusal


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_with_a_lora(run, demo, lora, tmp_path):
    args = ["generate", "a", "--checkpoint", demo, "--lora", lora(), *SMALL]
    code, (path,), err = run(*args, "--lora-scale", "0.5", "-o", tmp_path / "a.png")
    assert code == 0 and err == []
    settings = read_settings(path)
    fingerprint = load_lora(tmp_path / "lora").fingerprint
    assert settings["lora"] == {"fingerprint": fingerprint, "scale": 0.5}
    pipe = Kandinsky3Pipeline.from_pretrained(demo, dtype="float32")
    pipe.load_lora(tmp_path / "lora", 0.5)
    (again,) = pipe(**settings["call"], progress_bar=False).images
    np.testing.assert_array_equal(np.asarray(again), np.asarray(Image.open(path)))
    pipe.unload_lora()
    (plain,) = pipe(**settings["call"], progress_bar=False).images
    assert (np.asarray(plain) != np.asarray(again)).any()
