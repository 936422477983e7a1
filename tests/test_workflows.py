# SPDX-License-Identifier: Apache-2.0
""".github: the workflow and dependabot.yml match this repository, and their schemas (lint)."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from tools import needs_tool


ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
CI = GITHUB / "workflows" / "ci.yml"
JOBS = yaml.safe_load(CI.read_text())["jobs"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

SCHEMAS = {"workflows/ci.yml": "vendor.github-workflows", "dependabot.yml": "vendor.dependabot"}
RUNS = [
    (f"{name}, step {k}", step["run"])
    for name, job in JOBS.items()
    for k, step in enumerate(job["steps"])
    if "run" in step
]


def test_every_file_is_checked():
    files = {str(path.relative_to(GITHUB)) for path in GITHUB.rglob("*") if path.is_file()}
    assert {name for name in files if not name.endswith(".md")} == set(SCHEMAS)


def lint(*words: str, text: str | None = None) -> None:
    program = needs_tool(words[0], install="pip install -e '.[test]'")
    done = subprocess.run([program, *words[1:]], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.lint
@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name):
    lint("check-jsonschema", "--builtin-schema", SCHEMAS[name], str(GITHUB / name))


@pytest.mark.lint
@pytest.mark.parametrize("script", [run for _, run in RUNS], ids=[name for name, _ in RUNS])
def test_scripts(script):
    plain = "set -e\n" + re.sub(r"\$\{\{.*?\}\}", "value", script)  # GitHub runs bash -e
    lint("shellcheck", "--shell=bash", "-", text=plain)


def test_the_jobs():
    """All checks on the oldest Python, the default suite weekly on newer ones, the wheel on all."""
    assert [step.get("run") for step in JOBS["main"]["steps"]][-1] == ".ci/run --all"
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert JOBS["main"]["container"].startswith(f"python:{oldest}-")
    assert JOBS["wheel"]["strategy"]["matrix"]["python"] == [oldest, "3.12", "3.13"]
    assert JOBS["newest"]["strategy"]["matrix"]["python"] == ["3.12", "3.13"]
    newest = [step.get("run", "") for step in JOBS["newest"]["steps"]]
    assert newest[-1].startswith("pytest") and "pip install --upgrade jax jaxlib flax" in newest
    linted = [step.get("run") for step in JOBS["lint"]["steps"]]
    assert {"ruff format --check .", "pytest -m lint"} < set(linted)


def test_tools_are_required_where_they_are_installed():
    """No test of .ci/run or of the job `lint` may pass by a skip for want of a linter."""
    assert JOBS["lint"]["env"]["K3JAX_REQUIRE_TOOLS"] == "1"
    script = (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^ *export K3JAX_REQUIRE_TOOLS=1$", script, re.M)
    assert "pytest -m lint" in script


def test_the_jax_stack_is_updated_as_one():
    updates = yaml.safe_load((GITHUB / "dependabot.yml").read_text())["updates"]
    assert {u["package-ecosystem"] for u in updates} == {"pip", "docker", "github-actions"}
    stack = {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint"}
    for update in updates:
        folder = ROOT / update["directory"].strip("/")
        assert folder.is_dir()
        if update["package-ecosystem"] == "pip":
            assert stack <= set(update["groups"]["jax"]["patterns"])
