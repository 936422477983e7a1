# SPDX-License-Identifier: Apache-2.0
"""Manifests, and what is noticed when a file of a checkpoint changes."""

import json
import os
import zlib

import pytest
from etils import epath

from k3jax.checkpoints import manifest
from k3jax.files import CheckpointError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkpoint-like folder with a manifest; the stamps go to a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = epath.Path(tmp_path / "ckpt")
    for name in ("unet/a", "unet/d/b", "movq/c"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * 100)
    digests = {"unet": "1", "movq": "2"}
    manifest.write_manifest(folder, digests, manifest.file_digest, {"config.json": b"{}"})
    return folder


def flip(path, at=7):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files that are hashed."""
    names, digest = [], manifest.file_digest

    def spy(path):
        names.append(path.name)
        return digest(path)

    monkeypatch.setattr(manifest, "file_digest", spy)
    return names


def test_manifest_lists_every_file(folder):
    written = manifest.read_manifest(folder)
    assert written["components"] == {"unet": "1", "movq": "2"}
    assert sorted(written["files"]) == ["config.json", "movq/c", "unet/a", "unet/d/b"]
    content = b"unet/a" * 100
    crc = f"{zlib.crc32(content):08x}"
    assert written["files"]["unet/a"] == {"size": len(content), "crc32": crc}


def test_flipped_byte_is_named_and_other_components_are_not_read(folder, hashed):
    flip(folder / "unet" / "d" / "b")
    with pytest.raises(CheckpointError) as error:
        manifest.check_component(folder, "unet", hashed=True)
    assert str(folder / "unet/d/b") in str(error.value)
    assert "unet/a" not in str(error.value)
    assert sorted(hashed) == ["a", "b"]
    manifest.check_component(folder, "movq", hashed=True)


def test_sizes_are_compared_even_without_hashing(folder, hashed):
    (folder / "unet" / "a").write_bytes(b"short")
    (folder / "unet" / "d" / "b").unlink()
    with pytest.raises(CheckpointError, match=r"has 5 bytes instead of 600.*is missing"):
        manifest.check_component(folder, "unet", hashed=False)
    assert not hashed


def test_good_files_are_hashed_once(folder, hashed):
    manifest.check_component(folder, "unet", hashed=True)
    assert sorted(hashed) == ["a", "b"]
    hashed.clear()
    manifest.check_component(folder, "unet", hashed=True)
    assert not hashed
    flip(folder / "unet" / "a")
    os.utime(folder / "unet" / "a", ns=(1, 1))
    with pytest.raises(CheckpointError, match="unet/a"):
        manifest.check_component(folder, "unet", hashed=True)
    assert hashed == ["a"]


def test_bad_files_are_never_remembered_as_good(folder):
    flip(folder / "unet" / "a")
    for _ in range(2):
        with pytest.raises(CheckpointError):
            manifest.check_component(folder, "unet", hashed=True)


def test_processes_divide_the_hashing(folder, hashed):
    manifest.check_component(folder, "unet", hashed=True, share=(0, 2))
    assert hashed == ["a"]
    manifest.check_component(folder, "unet", hashed=True, share=(1, 2))
    assert hashed == ["a", "b"]


def test_unwritable_cache_is_no_error(folder, monkeypatch, hashed):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    for _ in range(2):
        manifest.check_component(folder, "unet", hashed=True)
    assert sorted(hashed) == ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "is missing"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        (json.dumps({"version": 1}), "is damaged"),
        (json.dumps({"version": 9}), "version 9.*upgrade"),
    ],
)
def test_bad_manifest(folder, content, message):
    path = folder / manifest.MANIFEST
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(CheckpointError, match=f"manifest.json .*{message}"):
        manifest.read_manifest(folder)
