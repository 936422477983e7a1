# SPDX-License-Identifier: Apache-2.0
"""The blocks of every README, run from top to bottom in one folder for each README.

The small model replaces Kandinsky 3's weights, folders replace buckets and repositories of the hub,
and commands that would take hours run with fewer steps or images. Plans are computed without the
TPU compiler (tests/planning has it). Commands of other programs are checked by test_readme.py and
tests/launch.
"""

import json
import shlex
import shutil
from pathlib import Path

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from k3jax.cli.main import main
from k3jax.planning import compiler

from made_programs import compiled
from readmes import READMES, ROOT, Block, blocks, name_of


FASTER = {
    "generate": ("--steps=2", "--height=128", "--width=128"),
    "img2img": ("--steps=5",),
    "inpaint": ("--steps=2",),
    "outpaint": ("--steps=2",),
    "synthesize": ("--steps=2",),
    "evaluate": ("--count=4", "--batch-size=4", "--steps=2"),
    "benchmark": ("--batch=1", "--repeats=1"),
    "train": (
        "--config.train.steps=2",
        "--config.train.batch_size=1",
        "--config.train.data.resolution=128",
        "--config.train.optimizer.warmup_steps=1",
    ),
}
"""Arguments that are added to a command."""

PROMPTS = ["a red circle", "a blue square"]


def small(words: list[str]) -> list[str]:
    """A command of k3jax without the program's name, with local folders and the small model."""
    command, *rest = [word.replace("gs://b/", "bucket/") for word in words[1:]]
    rest = [word.replace("gs://my-bucket/", "bucket/") for word in rest]
    if "kandinsky3" in rest and command != "info":
        rest[rest.index("kandinsky3")] = "tiny"
        rest += ["--checkpoint", "weights/kandinsky3"]
    more = FASTER.get(command, ())
    if command == "convert":
        from torch_checkpoints import ARCHITECTURE

        # What the original layout does not record, and is the same in everything published.
        more = [
            f"--config.model.{component}.{name}={value}"
            for component, values in ARCHITECTURE.items()
            for name, value in values.items()
        ]
    return [command, *rest, *more]


def write_hub(commands: list[list[str]]) -> None:
    """The repositories that these commands convert, in small, as folders."""
    sources = {words[2] for words in commands if words[:2] == ["k3jax", "convert"]}
    if sources:
        from torch_checkpoints import write_diffusers, write_original
    for source in sources:
        Path(source).mkdir(parents=True)
        if source.startswith("kandinsky-community/"):
            write_diffusers(Path(source))
        else:
            for variant in ("base", "flash", "inpainting"):
                write_original(Path(source), variant=variant)


def write_inputs(commands: list[list[str]]) -> None:
    """Weights, prompts, images and data that a README takes for granted."""
    Path("bucket").mkdir()
    written = {words[3] for words in commands if words[:2] == ["k3jax", "convert"]}
    for folder in {"weights/kandinsky3", "weights/inpainting", "bucket/kandinsky3"} - written:
        shutil.copytree(ROOT / "k3jax" / "weights" / "tiny", folder)
    Path("prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    rows = 9 * PROMPTS if any("000000017-2" in words for words in commands) else PROMPTS
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in rows))
    for folder in (".", "bucket"):
        parquet.write_table(pyarrow.table({"prompt": PROMPTS}), f"{folder}/prompts.parquet")
    for name, color in (("drawing", "red"), ("scene", "navy"), ("mask", "white")):
        Image.new("RGB", (128, 128), color).save(f"{name}.png")
    if any("--data" in words for words in commands):
        Path("pictures").mkdir()
        for number, prompt in enumerate(PROMPTS):
            Image.new("RGB", (128, 128), "navy").save(f"pictures/{number}.png")
            Path(f"pictures/{number}.txt").write_text(prompt)
    if ["k3jax", "verify", "gs://my-bucket/pictures"] in commands:
        assert main(["synthesize", "prompts.txt", "bucket/pictures", "--steps=2"]) == 0


@pytest.fixture
def folder(tmp_path, monkeypatch, one_device):
    """The working folder of a README's blocks."""
    monkeypatch.setattr(compiler, "check_libtpu", lambda: None)
    monkeypatch.setattr(compiler, "compile_in_child", lambda *args: compiled())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def run_command(words: list[str], monkeypatch, capsys) -> None:
    # Where Kubernetes starts it, its number is in the environment.
    if "--jobs" in words and "--job" not in words:
        monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    else:
        monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
    code = main(words)
    assert code == 0, f"k3jax {shlex.join(words)}:\n{capsys.readouterr().err}"


def run_python(block: Block, names: dict) -> None:
    """With the lines' own numbers in tracebacks."""
    exec(compile("\n" * (block.line - 1) + block.text, block.path, "exec"), names)


RUN = [
    path
    for path in READMES
    if any(
        block.language == "python" or "k3jax" in [words[0] for words in block.commands()]
        for block in blocks(path)
        if block.language != "text"
    )
]


@pytest.mark.slow
@pytest.mark.parametrize("path", RUN, ids=name_of)
def test_blocks_run(path, folder, monkeypatch, capsys):
    found = [block for block in blocks(path) if block.language != "text"]
    shell = [block for block in found if block.language == "bash"]
    commands = [w for block in shell for w in block.commands() if w[0] == "k3jax"]
    write_hub(commands)
    write_inputs(commands)
    names = {}
    for block in found:
        if block.language == "python":
            run_python(block, names)
            continue
        for words in block.commands():
            if words[0] == "k3jax":
                run_command(small(words), monkeypatch, capsys)


@pytest.mark.slow
def test_the_examples_of_the_first_page(folder, monkeypatch, capsys):
    """With nothing but the small model; that of the shell in two steps."""
    python, shell = (
        [block for block in blocks(ROOT / "README.md") if block.language == language][-1]
        for language in ("python", "bash")
    )
    run_python(python, {})
    assert Path("circle.png").exists()
    (words,) = shell.commands()
    run_command([*words[1:], "--steps=2"], monkeypatch, capsys)
    assert len(list(Path("out").glob("*_seed*.png"))) == 4
    assert len(list(Path("out").glob("contact_sheet*.png"))) == 1


def test_no_readme_is_forgotten():
    assert {name_of(path) for path in RUN} >= {
        "README.md",
        "k3jax/cli/README.md",
        "k3jax/pipelines/README.md",
        "k3jax/planning/README.md",
        "k3jax/synthesis/README.md",
        "k3jax/training/README.md",
        "configs/README.md",
        "convert/README.md",
    }
