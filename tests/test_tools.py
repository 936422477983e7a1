# SPDX-License-Identifier: Apache-2.0
"""A missing tool skips a test, or fails it where tools are required."""

import sys
from pathlib import Path

import pytest

from tools import NO_VOCABULARY, missing, needs_tool


def test_a_program_is_found():
    assert Path(needs_tool("no-such-program", "python3", install="")).samefile(sys.executable)


@pytest.mark.parametrize(
    "required, outcome", [("", pytest.skip.Exception), ("1", pytest.fail.Exception)]
)
def test_a_missing_program(monkeypatch, required, outcome):
    monkeypatch.setenv("K3JAX_REQUIRE_TOOLS", required)
    with pytest.raises(outcome, match="needs no-such-program: apt-get install it"):
        needs_tool("no-such-program", install="apt-get install it")


@pytest.mark.parametrize(
    "folder, outcome", [("", pytest.fail.Exception), ("none", pytest.skip.Exception)]
)
def test_a_machine_without_vocabulary_says_so(monkeypatch, folder, outcome):
    monkeypatch.setenv("K3JAX_REQUIRE_TOOLS", "1")
    monkeypatch.setenv("K3JAX_T5_TOKENIZER", folder)
    with pytest.raises(outcome):
        missing(NO_VOCABULARY)
