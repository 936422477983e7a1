# SPDX-License-Identifier: Apache-2.0
"""The command line in this process, with a small checkpoint or with no model at all."""

import os

import jax
import pytest

from k3jax.cli.main import main

import data_sets
import stub_pipeline


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A user's cache folder of this test session."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    """`datasets` takes equal files in another folder for the same, also those of earlier runs."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch):
    """As if nothing had started this process."""
    for name in os.environ:
        if name.startswith(("SLURM_", "TPU_", "JOB_", "MEGASCALE_", "JAX_PROCESS", "JAX_NUM_PROC")):
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def one_device_here():
    """One device for a whole file: the model's programs compile three times as fast."""
    one = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *args, **kwargs: one)
        patch.setattr(jax, "local_devices", lambda *args, **kwargs: one)
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return data_sets.write_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture
def stubs(monkeypatch):
    """Pipelines without a model, in the order in which they are made."""
    return stub_pipeline.install(monkeypatch.setattr)


@pytest.fixture
def run(capsys, checkpoint):
    """main() -> (exit code, lines of stdout, lines of stderr)."""

    def call(*words):
        if words[0] == "synthesize" and "--checkpoint" not in words:
            words = (*words, "--checkpoint", checkpoint)
        capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return call


@pytest.fixture
def made(run):
    """The same for what must go well; (stdout, stderr)."""

    def call(*words):
        code, out, err = run(*words)
        assert code == 0, (out, err)
        return out, err

    return call


@pytest.fixture
def refuses(run):
    """The one sentence with which main() refuses."""

    def call(*words):
        code, out, err = run(*words)
        assert code == 2, (out, err)
        errors = [line for line in err if line.startswith("k3jax: error: ")]
        assert len(errors) == 1, err
        return errors[0].removeprefix("k3jax: error: ")

    return call
