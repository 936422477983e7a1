# SPDX-License-Identifier: Apache-2.0
"""A missing tool skips a test, or fails it where tools are required."""

import sys
from pathlib import Path

import pytest

from tools import needs_tool


def test_a_program_is_found():
    assert Path(needs_tool("no-such-program", "python3", install="")).samefile(sys.executable)


@pytest.mark.parametrize(
    "required, outcome", [("", pytest.skip.Exception), ("1", pytest.fail.Exception)]
)
def test_a_missing_program(monkeypatch, required, outcome):
    monkeypatch.setenv("K3JAX_REQUIRE_TOOLS", required)
    with pytest.raises(outcome, match="needs no-such-program: apt-get install it"):
        needs_tool("no-such-program", install="apt-get install it")
