# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the Hugging Face hub, with its client replaced: no test uses a network."""

import shutil
from types import SimpleNamespace

from k3jax.convert import hub
from k3jax.convert.sources import open_source

from conversions import refused, write_index


class Hub:
    """Stands in for the hub's client: a listing, and downloads that are noted in `calls`."""

    def __init__(self, monkeypatch, folder):
        self.calls, self.folder, self.error = [], folder, None
        self.names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        monkeypatch.setattr(hub, "HfApi", lambda: self)
        monkeypatch.setattr(hub, "snapshot_download", self.snapshot_download)

    def model_info(self, repo, timeout):
        assert 1 <= timeout <= 15
        if self.error is not None:
            raise self.error
        files = [*self.names, "README.md", "images/a.png"]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])

    def snapshot_download(self, repo, **kwargs):
        self.calls.append((repo, kwargs))
        if self.folder is None:
            raise FileNotFoundError("pass 'local_files_only=False' as input")
        return str(self.folder)


def test_hugging_face_id(tmp_path, monkeypatch, diffusers):
    """The listing tells what is needed; only that is fetched; a folder of that name would win."""
    client = Hub(monkeypatch, diffusers)
    source = open_source("someone/kandinsky-3")
    assert source.origin == {"repo": "someone/kandinsky-3"}
    ((repo, kwargs),) = client.calls
    assert repo == "someone/kandinsky-3"
    assert set(kwargs["allow_patterns"]) == set(client.names) - {"model_index.json"}

    # Without a network, an earlier download is used.
    client.error = ConnectionError("no network.")
    open_source("someone/kandinsky-3")
    assert client.calls[-1] == (repo, {"local_files_only": True})

    client.folder = None
    message = refused("someone/kandinsky-3", tmp_path)
    assert "cannot be reached (no network): " in message
    assert "`hf download someone/kandinsky-3 --local-dir FOLDER`" in message
    assert "local_files_only" not in message
    client.error = None
    assert "cannot be fetched" in refused("someone/kandinsky-3", tmp_path)

    monkeypatch.chdir(tmp_path)
    shutil.copytree(diffusers, tmp_path / "someone" / "kandinsky-3")
    assert "path" in open_source("someone/kandinsky-3").origin


def test_the_index_of_a_repository_is_fetched_first(monkeypatch, copy):
    write_index(copy, "text_encoder", rename="encoder-{}.safetensors")
    client = Hub(monkeypatch, copy)
    open_source("someone/kandinsky-3")
    index = "text_encoder/model.safetensors.index.json"
    assert [set(kwargs["allow_patterns"]) for _, kwargs in client.calls] == [
        {index},
        set(client.names) - {"model_index.json", index},
    ]
