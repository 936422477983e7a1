# SPDX-License-Identifier: Apache-2.0
"""The wheel, built, installed and used by the steps of .github/workflows/ci.yml."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[1]
CI = ROOT / ".github" / "workflows" / "ci.yml"
MOST_BYTES = 30e6  # far below the limit of PyPI; most of it are weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def temporary(tmp_path_factory):
    """The folder with dist/, a clean environment and an image: the steps of the job `wheel`."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    sources.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    for name in ("k3jax", "configs", "convert"):
        ignored = ["__pycache__"]
        if name == "k3jax":  # some checkouts have links with these names in k3jax/
            ignored += ["configs", "convert"]
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns(*ignored))
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    environment = clean_environment(folder, PATH=path, RUNNER_TEMP=str(folder))
    for step in yaml.safe_load(CI.read_text())["jobs"]["wheel"]["steps"]:
        if "run" in step:
            run(["bash", "-eo", "pipefail", "-c", step["run"]], sources, environment)
    (sources / "dist").rename(folder / "dist")
    shutil.rmtree(sources)  # so that nothing is imported from here
    return folder


def clean_environment(folder: Path, **more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {**kept, "XDG_CACHE_HOME": str(folder / "cache"), "K3JAX_COMPILATION_CACHE": "0", **more}


def run(words, folder, environment, code: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def k3jax(folder: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess:
    command = [folder / "clean" / "bin" / "k3jax", *words]
    return run(command, folder, clean_environment(folder, JAX_PLATFORMS="cpu"), code)


def test_what_is_inside(temporary):
    (wheel,) = (temporary / "dist").glob("*.whl")
    assert wheel.stat().st_size < MOST_BYTES
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, inside in (("k3jax", "k3jax"), ("configs", "k3jax/configs")):
        for path in (ROOT / folder).rglob("*"):
            name = path.relative_to(ROOT / folder)
            if path.is_file() and "__pycache__" not in name.parts:
                assert f"{inside}/{name}" in names
    assert "k3jax/convert/to_torch.py" in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"k3jax"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_only_what_it_needs_was_installed(temporary):
    pip = [temporary / "clean" / "bin" / "pip", "list", "--format", "freeze"]
    listed = run(pip, temporary, clean_environment(temporary)).stdout.lower().splitlines()
    names = {line.split("==")[0] for line in listed}
    assert {"jax", "flax", "k3jax"} <= names
    assert not names & {"torch", "diffusers", "grain", "pyarrow", "pytest", "gcsfs", "libtpu"}


def test_it_installs_with_extras_as_in_a_notebook(temporary):
    (wheel,) = (temporary / "dist").glob("*.whl")
    pip = [temporary / "clean" / "bin" / "pip", "install", "--dry-run", "--no-deps"]
    done = run([*pip, f"{wheel.name}[tpu,synth]"], wheel.parent, clean_environment(temporary))
    assert "k3jax" in done.stdout + done.stderr


def test_help(temporary):
    text = k3jax(temporary, "--help").stdout
    assert all(name in text for name in ("synthesize", "kandinsky3", "v5e_8"))
    assert (temporary / "picture.png").stat().st_size > 0
    k3jax(temporary, "info", "tiny", "--verify")


@pytest.mark.parametrize(
    "words, extra",
    [
        (["train", "--config", "tiny"], "train"),
        (["convert", "somewhere", "weights"], "convert"),
        (["export", "tiny", "torch"], "convert"),
        (["synthesize", "prompts.txt", "out"], "synth"),
        (["verify", "out"], "synth"),
        (["plan", "--topology", "v5e:1x1", "--config", "tiny"], "tpu"),
    ],
)
def test_a_missing_extra_is_named(temporary, words, extra):
    (temporary / "prompts.txt").write_text("a red circle\n")
    error = k3jax(temporary, *words, code=2).stderr.splitlines()[-1]
    assert error.startswith("k3jax: error: ") and f"pip install 'k3jax[{extra}]'" in error
    assert not any((temporary / name).exists() for name in ("out", "weights", "torch"))
