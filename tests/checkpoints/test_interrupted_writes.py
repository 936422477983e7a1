# SPDX-License-Identifier: Apache-2.0
"""A full disk, or a kill, at each write of a checkpoint: nothing is taken for a checkpoint that is
none, an older one stays, and the same command then finishes."""

import contextlib
import os
import resource
import shutil

import pytest

from k3jax.checkpoints.format import looks_like_checkpoint, read_checkpoint
from k3jax.checkpoints.restore import verify
from k3jax.files import CheckpointError

from checkpoints import disk_arrays, one_sentence, write
from interruptions import NEED_ROOM, WRITES, disk_full_at, snapshots


@pytest.fixture(scope="module")
def writes(tmp_path_factory) -> int:
    """How many writes of a checkpoint need room on the disk."""
    folder, events = tmp_path_factory.mktemp("writes"), []
    with WRITES.watched(folder, events.append):
        write(folder / "c")
    count = sum(event in NEED_ROOM for event in events)
    assert count > 30
    return count


def full_disk(tmp_path, number):
    with pytest.raises(CheckpointError) as error, disk_full_at(tmp_path, number):
        write(tmp_path / "c")
    assert str(tmp_path / "c") in one_sentence(error)
    assert "No space left on device" in str(error.value)
    assert os.listdir(tmp_path) == []


def test_a_full_disk(tmp_path, writes):
    for number in range(0, writes, 11):
        full_disk(tmp_path, number)
    write(tmp_path / "c")
    assert verify(tmp_path / "c") == []


@pytest.mark.slow
def test_a_full_disk_at_every_write(tmp_path, writes):
    for number in range(writes):
        full_disk(tmp_path, number)


def test_a_full_disk_keeps_the_checkpoint_that_is_to_be_replaced(tmp_path, writes):
    write(tmp_path / "c")
    before = read_checkpoint(tmp_path / "c").fingerprint
    for number in range(1, writes + 2, 14):
        done = False
        with contextlib.suppress(CheckpointError), disk_full_at(tmp_path, number):
            write(tmp_path / "c", projection=disk_arrays("text_projection", seed=3), overwrite=True)
            done = True
        assert os.listdir(tmp_path) == ["c"] and verify(tmp_path / "c") == []
        assert (read_checkpoint(tmp_path / "c").fingerprint == before) != done


def test_files_that_may_not_grow(tmp_path):
    """TensorStore's own writes fail, as those of a quota or of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(CheckpointError) as error:
            write(tmp_path / "c")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path / "c") in one_sentence(error)
    assert os.listdir(tmp_path) == []


def killed(tmp_path, chosen, overwrite):
    """Interrupts at the chosen writes, and runs the same command again on what each left."""
    work = tmp_path / "work"
    work.mkdir()
    old = read_checkpoint(write(work / "c")).fingerprint if overwrite else None
    projection = disk_arrays("text_projection", seed=3)
    with snapshots(work, tmp_path, chosen) as copies:
        write(work / "c", projection=projection, overwrite=overwrite)
    new = read_checkpoint(work / "c").fingerprint
    assert copies
    for copy in copies:
        fingerprints = []
        for path in copy.iterdir():
            if path.name == "c":
                assert verify(path) == []
                fingerprints.append(read_checkpoint(path).fingerprint)
            elif ".incomplete-" in path.name and looks_like_checkpoint(path):
                assert verify(path) == []  # it was whole, and only had to take its name
        assert fingerprints in ([], [old], [new])
        if fingerprints == [new] and not overwrite:
            continue
        write(copy / "c", projection=projection, overwrite=overwrite)
        assert os.listdir(copy) == ["c"] and verify(copy / "c") == []
        assert read_checkpoint(copy / "c").fingerprint == new
        shutil.rmtree(copy)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill(tmp_path, writes, overwrite):
    killed(tmp_path, range(2, writes, 14), overwrite)


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_at_every_write(tmp_path, overwrite):
    killed(tmp_path, None, overwrite)
