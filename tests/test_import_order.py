# SPDX-License-Identifier: Apache-2.0
"""The import order of .importlinter, over the package as it is installed (lane lint).

In the repository convert/ and configs/ are outside of k3jax/, and import-linter would miss them.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tools import needs_tool


ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.lint


@pytest.fixture
def package(tmp_path):
    ignore = shutil.ignore_patterns("__pycache__", "weights")
    shutil.copytree(ROOT / "k3jax", tmp_path / "k3jax", ignore=ignore)
    for name in ("convert", "configs"):
        shutil.copytree(ROOT / name, tmp_path / "k3jax" / name, ignore=ignore, dirs_exist_ok=True)
    shutil.copy(ROOT / ".importlinter", tmp_path)
    return tmp_path / "k3jax"


def lint_imports(package: Path) -> subprocess.CompletedProcess:
    program = needs_tool("lint-imports", install="pip install -e '.[test]'")
    return subprocess.run(
        [program, "--no-cache"],
        cwd=package.parent,
        env=os.environ | {"PYTHONPATH": str(package.parent)},
        capture_output=True,
        text=True,
    )


def test_imports_point_one_way(package):
    done = lint_imports(package)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_import_against_the_order_is_refused(package):
    with (package / "sharding.py").open("a") as file:
        file.write("\nimport k3jax.convert.rules\n")
    done = lint_imports(package)
    assert done.returncode == 1 and "k3jax.sharding -> k3jax.convert.rules" in done.stdout
