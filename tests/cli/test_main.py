# SPDX-License-Identifier: Apache-2.0
"""What all commands share: help, errors and the compilation cache."""

import os
import pathlib
import pwd
import subprocess
import sys

import jax
import pytest

from k3jax.cli import environment as machine
from k3jax.cli import generate
from k3jax.cli.environment import FLAG
from k3jax.cli.main import split_overrides
from k3jax.pipelines.compilation_cache import enable_compilation_cache


HEAVY = ("jax", "torch", "transformers", "ml_collections", "orbax", "flax")


def test_help_and_usage_errors_import_nothing_heavy():
    script = f"""
import contextlib, io, sys, time
start = time.perf_counter()
from k3jax.cli.image_files import PlannedImage
from k3jax.cli.main import COMMANDS, main
for args in ([], *([command] for command in COMMANDS)):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main([*args, "--help"])
        except SystemExit as end:
            assert end.code == 0
    assert "--config" in out.getvalue()
assert main(["generate", "a", "--stesp", "3"]) == 2
assert main(["generate", "a", "--config.generate.sede=3"]) == 2
assert main(["info"]) == 2
assert main(["plan", "--topology", "v9:2x2"]) == 2
heavy = [name for name in {HEAVY} if name in sys.modules]
assert not heavy, heavy
print(f"{{time.perf_counter() - start:.2f}} s")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print("all helps together:", done.stdout)


@pytest.mark.parametrize(
    "error, expected",
    [
        (KeyboardInterrupt(), (130, "k3jax: interrupted.")),
        (OSError(28, "No space left on device", "/x"), (2, "/x: No space left on device.")),
        (ValueError("line one\n  line two"), (2, "k3jax: error: line one line two")),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), (2, "have not enough memory")),
    ],
)
def test_errors_are_one_line(run, monkeypatch, error, expected):
    def fail(args):
        raise error

    monkeypatch.setattr(generate, "run", fail)
    code, _, err = run("generate", "a")
    assert code == expected[0] and len(err) == 1 and expected[1] in err[0]
    if isinstance(error, ValueError):
        assert "K3JAX_TRACEBACK=1" in err[0]  # raised outside of k3jax: perhaps a defect of ours
        monkeypatch.setenv("K3JAX_TRACEBACK", "1")
        assert any("in fail" in line for line in run("generate", "a")[2])


def test_defects_keep_their_traceback(run, monkeypatch):
    def fail(args):
        raise TypeError("a defect")

    monkeypatch.setattr(generate, "run", fail)
    with pytest.raises(TypeError, match="a defect"):
        run("generate", "a")


def test_overrides_are_split_off():
    words = ["a", "--config.b.c=1=2", "--config", "d", "--config.e", "-1", "--", "--config.f=3"]
    assert split_overrides(words) == (
        ["a", "--config", "d", "--", "--config.f=3"],
        [("b.c", "1=2"), ("e", "-1")],
    )


def test_compilation_cache(tmp_path, monkeypatch):
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    assert enable_compilation_cache() == before["jax_compilation_cache_dir"]
    assert {name: getattr(jax.config, name) for name in names} == before
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv("K3JAX_COMPILATION_CACHE", "0")
        assert enable_compilation_cache() is None
        monkeypatch.delenv("K3JAX_COMPILATION_CACHE")
        assert enable_compilation_cache() == str(tmp_path / "k3jax" / "xla")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "k3jax" / "xla")
        assert pathlib.Path(tmp_path / "k3jax" / "xla").stat().st_mode & 0o777 == 0o700
        jax.config.update("jax_compilation_cache_dir", None)
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert enable_compilation_cache() is None
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({"JAX_PLATFORMS": "cpu"}, f"{FLAG}=1"),
        ({"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--a=b"}, f"--a=b {FLAG}=1"),
        ({"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{FLAG}=3"}, f"{FLAG}=3"),
        ({"JAX_PLATFORMS": "tpu,cpu"}, ""),
        ({}, f"{FLAG}=1"),
    ],
)
def test_less_optimising_on_cpus(monkeypatch, environment, expected):
    monkeypatch.setattr(machine, "ACCELERATORS", ("no_such_package",))
    for name in ("JAX_PLATFORMS", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    machine.compile_quickly_on_cpus()
    assert os.environ.get("XLA_FLAGS", "") == expected


def test_accelerators_keep_their_optimising(monkeypatch):
    monkeypatch.setattr(machine, "ACCELERATORS", ("no_such_package", "k3jax"))
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("XLA_FLAGS", "")
    machine.compile_quickly_on_cpus()
    assert os.environ["XLA_FLAGS"] == ""


def test_without_docstrings(tmp_path):
    """`python -OO` removes them; the help of the commands is made of them."""
    command = [sys.executable, "-OO", "-m", "k3jax", "generate", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "--num-images" in done.stdout, done.stderr


def test_closed_standard_streams(tmp_path):
    """As by `>&-` and `<&-`: the output goes nowhere, also not into the next file opened."""
    script = (
        "import sys\n"
        "from k3jax.cli.main import main\n"
        "codes = [main(['generate', '--prompts-file', '-']), main(['info', 'nowhere'])]\n"
        "open('codes', 'w').write(str(codes))\n"
        "print('lost')\n"
    )
    command = f'exec {sys.executable} -c "{script}" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path).returncode == 0
    assert (tmp_path / "codes").read_text() == "[2, 2]"


@pytest.fixture
def no_home(monkeypatch):
    """A user without HOME and without an entry in /etc/passwd."""

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_without_a_home_directory(run, refuses, no_home):
    code, lines, _ = run("info", "tiny", "--verify")
    assert code == 0 and lines[-1] == "  All files are as they were written."
    assert "home directory" in refuses("generate", "a", "-o", "~/out")
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        assert enable_compilation_cache() is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
