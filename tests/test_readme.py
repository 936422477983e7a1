# SPDX-License-Identifier: Apache-2.0
"""The README's commands are commands, and its Python runs."""

import dataclasses
import re
import shlex
from pathlib import Path

import jax
import pytest

from k3jax.cli.main import parse
from k3jax.pipelines import loading
from k3jax.pipelines.pipeline import BasePipeline
from k3jax.sharding import make_mesh


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


COMMANDS = [
    command.strip()
    for block in blocks("bash")
    for line in block.splitlines()
    for command in line.split("&&")
    if command.strip().startswith("k3jax ")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_understood(command):
    parse(shlex.split(command)[1:])


def test_the_two_lines_that_set_everything_up():
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert any(line.startswith("pip install -e . && k3jax generate") for line in lines)
    assert "pip install -e '.[test]' && pytest" in lines
    script = (ROOT / ".ci" / "run").read_text()
    assert "pip install -e '.[test]' && pytest" in script


@pytest.mark.parametrize("block", blocks("python"))
def test_python_block_runs(block, tmp_path, monkeypatch):
    """With the small model in the place of Kandinsky 3's weights, and few steps."""
    init = BasePipeline.__init__

    def few_steps(self, config, *args, **kwargs):
        sampler = dataclasses.replace(config.sampler, num_inference_steps=5)
        init(self, dataclasses.replace(config, sampler=sampler), *args, **kwargs)

    monkeypatch.setattr(BasePipeline, "__init__", few_steps)
    # One device: programs for 8 take three times as long to compile, and other tests have them.
    one = make_mesh("data=1", jax.devices()[:1])
    monkeypatch.setattr(loading, "make_mesh", lambda spec: one)
    monkeypatch.chdir(tmp_path)
    exec(compile(block.replace("weights/kandinsky3", "tiny"), "README.md", "exec"), {})
    for picture in re.findall(r'save\("(.*?)"\)', block):
        assert (tmp_path / picture).exists()


def test_the_map_of_the_code_names_what_exists():
    names = re.findall(r"^    ([\w/]+(?:\*?\.py|/)) ", README, re.M)
    assert len(names) > 15
    for name in names:
        assert list(ROOT.glob(name.rstrip("/"))), name
