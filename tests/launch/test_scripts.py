# SPDX-License-Identifier: Apache-2.0
"""The shell scripts and the Dockerfile, by their linters."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from manifests import GKE, ROOT


SCRIPTS = sorted([*(ROOT / "launch").rglob("*.sh"), *(ROOT / "launch").rglob("*.sbatch")])


def lint(*words):
    """A linter of the `test` extra, which pip has put beside Python."""
    program = shutil.which(words[0], path=sysconfig.get_path("scripts"))
    assert program, f"{words[0]} is not installed: pip install -e '.[test]'"
    done = subprocess.run([program, *words[1:]], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_scripts():
    assert {path.name for path in SCRIPTS} >= {"tpu_vm.sh", "slurm.sbatch"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(path: Path):
    lint("shellcheck", str(path))


def test_hadolint():
    lint("hadolint", "--failure-threshold", "style", str(GKE / "Dockerfile"))
