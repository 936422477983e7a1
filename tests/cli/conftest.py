# SPDX-License-Identifier: Apache-2.0
"""The command line in this process, with a cache folder of its own."""

import pytest
from PIL import Image

from k3jax.cli.image_run import ImageRun
from k3jax.cli.main import main

from random_checkpoint import write_random_checkpoint


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A user's cache folder of this test session."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def demo(cache, tmp_path_factory):
    """A small checkpoint with random weights."""
    path = tmp_path_factory.mktemp("checkpoints") / "demo"
    write_random_checkpoint(path)
    return path


@pytest.fixture
def planned(monkeypatch):
    """The runs that commands would start, with the arguments of `write`; nothing is generated."""
    runs = []

    def write(self, images, progress, *inputs):
        runs.append((self, images, *inputs))
        return [Image.new("RGB", (64, 64)) for _ in images]

    monkeypatch.setattr(ImageRun, "write", write)
    return runs


@pytest.fixture
def run(capsys, cache):
    """main() -> (exit code, lines of stdout, lines of stderr)."""

    def call(*args):
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return call


@pytest.fixture
def refuses(run):
    """The one line with which main() refuses."""

    def call(*args):
        code, out, err = run(*args)
        assert code == 2 and not out
        assert len(err) == 1 and err[0].startswith("k3jax: error: "), err
        return err[0].removeprefix("k3jax: error: ")

    return call
