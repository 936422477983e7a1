# SPDX-License-Identifier: Apache-2.0
"""launch/gke/Dockerfile: its rules, and its steps replayed without a container."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

from manifests import GKE, ROOT


def instructions() -> list[tuple[str, str]]:
    """(word, rest) of each instruction, with continuation lines joined as Docker does."""
    lines = (GKE / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    joined = re.sub(r"\\\n", "", text).splitlines()
    return [tuple(line.split(None, 1)) for line in joined if line.strip()]


STEPS = instructions()


def all_of(word: str) -> list[str]:
    return [rest for name, rest in STEPS if name == word]


def sources(copy: str) -> list[str]:
    return shlex.split(copy)[:-1]


def test_what_it_copies_is_there_and_in_the_build_context():
    lines = (GKE / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    copied = {source for copy in all_of("COPY") for source in sources(copy)}
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)


def test_what_changes_often_comes_last():
    """A change of the code must not reinstall the dependencies."""
    copied = [source for copy in all_of("COPY") for source in sources(copy)]
    assert copied.index("pyproject.toml") < copied.index("k3jax")
    first = next(k for k, (word, rest) in enumerate(STEPS) if "pip install" in rest)
    before = [rest for word, rest in STEPS[:first] if word == "COPY"]
    assert before == ["pyproject.toml launch/gke/constraints.txt ./"]


def test_it_is_not_root_and_everything_is_pinned():
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", all_of("FROM")[0])
    assert int(all_of("USER")[-1]) > 0
    lines = (GKE / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in pins)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["synth"], *extras["gcs"], "libtpu"]
    names = {line.split("==")[0] for line in pins}
    for requirement in wanted:
        assert re.match(r"[\w.-]+", requirement)[0].lower() in names


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the pins are for Python 3.11")
def test_its_steps_in_a_clean_environment(tmp_path):
    """For the CPU, without Debian and the user."""
    work, environment = tmp_path / "k3jax", tmp_path / "env"
    work.mkdir()
    venv.create(environment, with_pip=True)
    variables = {
        **{k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")},
        "PATH": f"{environment / 'bin'}:/usr/bin:/bin",
        "ACCELERATOR": "",
    }

    def run(words, folder=work):
        done = subprocess.run(words, cwd=folder, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    for word, rest in STEPS:
        if word == "COPY":
            _copy(sources(rest), work / shlex.split(rest)[-1])
        elif word == "RUN" and not rest.startswith("useradd"):
            run(["/bin/sh", "-c", rest])
    assert "setuptools" in (work / "requirements.txt").read_text().split("\n")[0]
    assert run(["k3jax", "--version"], tmp_path).startswith("k3jax ")
    # The packaged model and configs are in what was installed, not only in the source.
    assert "tiny" in run(["k3jax", "--help"], tmp_path)
    where = run([environment / "bin" / "python", "-c", "import k3jax; print(k3jax.__file__)"], "/")
    assert Path(where.strip()).is_relative_to(environment)
    assert (Path(where.strip()).parent / "weights" / "tiny" / "config.json").exists()
    pinned = dict(
        line.split("==")
        for line in (GKE / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    frozen = run(["pip", "freeze", "--all"]).split()
    there = dict(line.split("==") for line in frozen if "==" in line)
    own = {"pip", "k3jax"}
    for name, version in there.items():
        if name not in own:
            assert pinned[name.lower()] == version, f"{name} is not in constraints.txt"


def _copy(names, target):
    for name in names:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, target, ignore=ignore, dirs_exist_ok=True)
        else:
            shutil.copy(source, target)
