# SPDX-License-Identifier: Apache-2.0
"""The README's blocks of commands, run from top to bottom with the small model.

What a block takes for granted (weights, pictures, prompts, a bucket) is there, in small; commands
that would take hours are given fewer steps or images, and plans are made up to the TPU compiler, of
which tests/planning has the rest. Blocks of other programs (launch/, docker, kubectl) are run by
tests/launch.
"""

import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from k3jax.checkpoints.packaged import DEFAULT
from k3jax.cli.main import main
from k3jax.pipelines.pipeline import BasePipeline
from k3jax.planning import compiler

from made_programs import compiled
from torch_checkpoints import ARCHITECTURE, write_diffusers, write_original


README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = [
    block
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    if re.search(r"^k3jax ", block, re.M)
]
SHORTER = {
    "train": (
        "--config.train.steps=2",
        "--config.train.batch_size=1",
        "--config.train.data.resolution=128",
        "--config.train.optimizer.warmup_steps=1",
    ),
    # What the original layout does not say, and is always 64 and 32 in what was published.
    "convert": tuple(
        f"--config.model.{component}.{name}={value}"
        for component, values in ARCHITECTURE.items()
        for name, value in values.items()
    ),
    "evaluate": ("--count=4", "--batch-size=4", "--steps=2"),
}
"""What a command is given besides."""


def write_originals(folder: Path) -> None:
    for variant in ("base", "flash", "inpainting"):
        write_original(folder, variant=variant)


HUB = {
    "kandinsky-community/kandinsky-3": write_diffusers,
    "ai-forever/Kandinsky3.1": write_originals,
}
"""Folders in the place of repositories on the hub."""


SMALL = "--config tiny --checkpoint weights/kandinsky3"


def commands(block: str) -> list[list[str]]:
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(in_small(line))[1:] for line in lines if line.startswith("k3jax ")]


def in_small(line: str) -> str:
    """A command with what is here in the place of a bucket and of the full-size model."""
    return line.replace("gs://b/", "bucket/").replace("--config kandinsky3", SMALL)


def furnish(block: str) -> None:
    """Puts what a block needs into the working directory."""
    for name in ("weights/kandinsky3", "weights/inpainting", "bucket/kandinsky3"):
        if "k3jax convert" not in block:
            shutil.copytree(DEFAULT, name)
    if "k3jax convert" in block:
        for name, write in HUB.items():
            Path(name).mkdir(parents=True)
            write(Path(name))
    prompts = ["a red circle", "a blue square"]
    Path("prompts.txt").write_text("\n".join(prompts) + "\n")
    # Some lines more where a command speaks of the sample 17.
    lines = prompts * 9 if "000000017" in block else prompts
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in lines))
    table = pyarrow.table({"prompt": prompts})
    for folder in (".", "bucket"):
        parquet.write_table(table, f"{folder}/prompts.parquet")
    for name, color in (("drawing", "red"), ("scene", "navy"), ("mask", "white")):
        Image.new("RGB", (128, 128), color).save(f"{name}.png")
    if "--data pictures" in block:
        Path("pictures").mkdir()
        for number, prompt in enumerate(prompts):
            Image.new("RGB", (128, 128), "navy").save(f"pictures/{number}.png")
            Path(f"pictures/{number}.txt").write_text(prompt)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("block", BLOCKS, ids=[b.splitlines()[0][:50] for b in BLOCKS])
def test_the_commands_run(block, tmp_path, monkeypatch, capsys):
    init = BasePipeline.__init__

    def few_steps(self, config, *args, **kwargs):
        sampler = dataclasses.replace(config.sampler, num_inference_steps=5)
        init(self, dataclasses.replace(config, sampler=sampler), *args, **kwargs)

    monkeypatch.setattr(BasePipeline, "__init__", few_steps)
    monkeypatch.setattr(compiler, "check_libtpu", lambda: None)
    monkeypatch.setattr(compiler, "compile_in_child", lambda *args: compiled())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "work" / "bucket").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    furnish(block)
    for command in commands(block):
        # Where Kubernetes starts it, its number is in the environment.
        if "--jobs" in command and "--job" not in command:
            monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
        else:
            monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
        code = main([*command, *SHORTER.get(command[0], ())])
        assert code == 0, f"k3jax {shlex.join(command)}:\n{capsys.readouterr().err}"


def test_no_block_is_forgotten():
    assert len(BLOCKS) >= 9
    ran = {command[0] for block in BLOCKS for command in commands(block)}
    expected = "generate img2img synthesize train convert export evaluate plan"
    assert ran >= set(expected.split())
