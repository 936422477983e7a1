# SPDX-License-Identifier: Apache-2.0
"""The README's commands are commands, and its Python runs."""

import re
import shlex
from pathlib import Path

import pytest

from k3jax.cli.main import parse
from k3jax.demo import write_demo_checkpoint


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


def test_python_block_runs(tmp_path, monkeypatch):
    """With the demo's weights in the place of the real ones."""
    (block,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    write_demo_checkpoint(tmp_path / "weights" / "kandinsky3")
    exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "corgi.png").exists()


def test_the_map_of_the_code_names_what_exists():
    names = re.findall(r"^    ([\w/]+(?:\*?\.py|/)) ", README, re.M)
    assert len(names) > 15
    for name in names:
        assert list(ROOT.glob(name.rstrip("/"))), name
