# SPDX-License-Identifier: Apache-2.0
"""Damaged and wrong checkpoints: one clear sentence each."""

import gc
import json
import os

import numpy as np
import pytest

from k3jax.checkpoints.format import read_checkpoint
from k3jax.checkpoints.restore import restore, verify
from k3jax.files import CheckpointError

from checkpoints import disk_arrays, flip, largest_file, one_sentence, write


def test_flipped_byte(ckpt):
    restore(ckpt, "text_encoder")
    file = flip(ckpt, "text_encoder")
    with pytest.raises(CheckpointError) as error:
        restore(ckpt, "text_encoder")
    assert str(file) in one_sentence(error)
    restore(ckpt, "text_encoder", verify=False)  # Orbax itself sees nothing
    assert verify(ckpt) == [
        f"{file} has other bytes than when it was written (its checksum differs)",
    ]
    restore(ckpt, "text_projection")


@pytest.mark.parametrize("damage", ["truncated", "deleted"])
def test_truncated_and_deleted_file(ckpt, damage):
    file = largest_file(ckpt, "text_encoder")
    if damage == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.unlink()
    for check in (None, False):
        with pytest.raises(CheckpointError) as error:
            restore(ckpt, "text_encoder", verify=check)
        assert str(file) in one_sentence(error)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["truncated", "deleted", "no metadata", "no index"])
def test_what_orbax_finds_is_one_sentence(ckpt, damage, monkeypatch, capfd):
    """Without the check of sizes, as in a bucket."""
    monkeypatch.setattr("k3jax.checkpoints.restore.check_component", lambda *a, **k: None)
    file = largest_file(ckpt, "text_encoder")
    if damage == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "deleted":
        file.unlink()
    elif damage == "no metadata":
        next((ckpt / "text_encoder").rglob("_METADATA")).unlink()
    else:
        for file in (ckpt / "text_encoder").rglob("manifest.ocdbt"):
            file.unlink()
    with pytest.raises(CheckpointError, match="text_encoder cannot be read") as error:
        restore(ckpt, "text_encoder")
    one_sentence(error)
    del error
    gc.collect()
    assert capfd.readouterr().err.count("\n") < 50  # were hundreds


def test_all_wrong_arrays_are_named_at_once(tmp_path):
    arrays = disk_arrays("text_encoder")
    del arrays["layers.1.mlp.wo.kernel"], arrays["final_norm.scale"]
    arrays["layers.3.mlp.wo.kernel"] = np.ones((2, 2), np.float32)
    arrays["lm_head.kernel"] = np.ones(3, np.float32)
    arrays["layers.2.attention.q.kernel"] = np.ones((4, 4), np.float32)
    path = write(tmp_path / "c", encoder=arrays)
    with pytest.raises(CheckpointError) as error:
        restore(path, "text_encoder")
    text = one_sentence(error)
    assert "2 missing: final_norm.scale, layers.1.mlp.wo.kernel;" in text
    assert "2 unknown: layers.3.mlp.wo.kernel, lm_head.kernel;" in text
    assert "layers.2.attention.q.kernel ((4, 4) instead of (16, 16))" in text


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(format_version=2), "format version 2, but this k3jax reads 1"),
        (lambda c: c.pop("format_version"), "no format_version"),
        (lambda c: c.pop("unet"), "lacks unet"),
        (lambda c: c.update(unett={}), "no key 'unett'.*'unet'"),
        (lambda c: c["unet"].update(group=3), "unet has no key 'group'.*'groups'"),
        (lambda c: c["components"].update(vae=None), "components .*vae"),
        (lambda c: c["components"].update(movq=None), "its folder movq is missing"),
    ],
)
def test_bad_config(ckpt, change, message):
    config = json.loads((ckpt / "config.json").read_text())
    change(config)
    (ckpt / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message) as error:
        read_checkpoint(ckpt)
    one_sentence(error)


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        read_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="k3jax convert owner/name DIR"):
        read_checkpoint("owner/name")
    with pytest.raises(CheckpointError, match=r"it has no config\.json\.$"):
        read_checkpoint(tmp_path)
    (tmp_path / "model_index.json").touch()
    with pytest.raises(CheckpointError, match="k3jax convert"):
        read_checkpoint(tmp_path)
    (tmp_path / "original" / "weights").mkdir(parents=True)
    (tmp_path / "original" / "weights" / "kandinsky3.pt").touch()
    with pytest.raises(CheckpointError, match="k3jax convert"):
        read_checkpoint(tmp_path / "original")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        read_checkpoint(tmp_path)
