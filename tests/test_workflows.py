# SPDX-License-Identifier: Apache-2.0
""".github: valid by the published schemas, and about what is in this repository."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml


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
    there = {str(path.relative_to(GITHUB)) for path in GITHUB.rglob("*") if path.is_file()}
    assert there == set(SCHEMAS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name):
    words = ["-m", "check_jsonschema", "--builtin-schema", SCHEMAS[name], str(GITHUB / name)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", [run for _, run in RUNS], ids=[name for name, _ in RUNS])
def test_scripts(script):
    plain = "set -e\n" + re.sub(r"\$\{\{.*?\}\}", "value", script)  # GitHub runs bash -e
    done = subprocess.run(
        ["shellcheck", "--shell=bash", "-"], input=plain, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_the_jobs():
    """Every check of .ci/run on the oldest Python, the rest on all that the README promises."""
    assert [step.get("run") for step in JOBS["main"]["steps"]][-1] == ".ci/run --all"
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert JOBS["main"]["container"].startswith(f"python:{oldest}-")
    assert JOBS["wheel"]["strategy"]["matrix"]["python"] == [oldest, "3.12", "3.13"]
    linted = " ".join(step.get("run", "") for step in JOBS["lint"]["steps"])
    assert "ruff check" in linted and "ruff format --check" in linted
    ruff = next(r for r in PROJECT["optional-dependencies"]["test"] if r.startswith("ruff"))
    assert f"pip install '{ruff}'" in linted


def test_the_jax_stack_is_updated_as_one():
    updates = yaml.safe_load((GITHUB / "dependabot.yml").read_text())["updates"]
    assert {u["package-ecosystem"] for u in updates} == {"pip", "docker", "github-actions"}
    stack = {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint"}
    for update in updates:
        folder = ROOT / update["directory"].strip("/")
        assert folder.is_dir()
        if update["package-ecosystem"] == "pip":
            assert stack <= set(update["groups"]["jax"]["patterns"])
