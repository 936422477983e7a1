# SPDX-License-Identifier: Apache-2.0
"""The loader: batches in one order, whatever reads them, and from where they stopped."""

import collections
import json
import sys
import threading

import numpy as np
import pytest

from k3jax.training.data.loader import Loader
from k3jax.training.data.open_source import open_source

from data_sources import (
    KINDS,
    SHAPES,
    assert_same,
    encoded,
    picture,
    small,
    take,
    write_data,
    write_folder,
)


pytestmark = pytest.mark.filterwarnings("ignore::k3jax.training.data.buckets.EnlargedWarning")


def open_loader(config, batch_size=4, seed=1, *place, **more) -> Loader:
    return Loader(open_source(config), config, batch_size, seed, *place, **more)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_exactly_where_it_stopped(kind, shuffle, tmp_path):
    config = write_data(kind, tmp_path)
    config = small(kind, config.path, shuffle=shuffle, caption_column=config.caption_column)
    with open_loader(config) as loader:
        whole = take(loader, 8)  # 13 samples: more than two epochs
        assert loader.epoch == 2
    for stop in (0, 1, 3, 7):
        with open_loader(config) as loader:
            take(loader, stop)
            state = json.loads(json.dumps(loader.state()))
        with open_loader(config) as loader:
            next(loader)  # something was read already
            loader.restore(state)
            assert_same(take(loader, 8 - stop), whole[stop:])
            loader.restore(state)  # and back again
            assert_same(take(loader, 1 if stop < 8 else 0), whole[stop : stop + 1])


def test_batches_hold_what_the_source_holds(tmp_path):
    config = small("folder", write_data("folder", tmp_path, count=24).path, resolution=128)
    seen, shapes = collections.Counter(), set()
    source = open_source(config)
    numbers = {source.key(n): n for n in range(len(source))}
    with Loader(source, config, 4, seed=0, multiple=32) as loader:
        while loader.epoch < 2:
            batch = next(loader)
            seen.update(batch["keys"])
            assert batch["images"].dtype == np.uint8
            rows = zip(batch["images"], batch["keys"], batch["captions"], strict=True)
            for image, key, caption in rows:
                assert caption == source.caption(numbers[key])
                height, width = SHAPES[int(key[2:5]) % 3]
                assert (image.shape[0] > image.shape[1]) == (height > width)
            shapes.add(batch["images"].shape)
    assert shapes == {(4, 128, 128, 3), (4, 96, 160, 3), (4, 160, 96, 3)}
    assert len(seen) == 24 and set(seen.values()) == {2}


def test_pixels_of_an_image_of_the_right_size_are_kept(tmp_path):
    rows = [(encoded(picture(n, 64, 64)), str(n)) for n in range(4)]
    write_folder(tmp_path, rows)
    with open_loader(small("folder", tmp_path)) as loader:
        batch = next(loader)
    for image, caption in zip(batch["images"], batch["captions"], strict=True):
        np.testing.assert_array_equal(image, picture(int(caption), 64, 64))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_same_global_batches(count, tmp_path):
    config = write_data("webdataset", tmp_path)
    with open_loader(config) as loader:
        whole = take(loader, 5)
    parts = []
    for process in range(count):
        with open_loader(config, 4, 1, process, count) as loader:
            parts.append(take(loader, 5))
            assert loader.state()["batch"] == 5
    for number, batch in enumerate(whole):
        rows = [part[number] for part in parts]
        np.testing.assert_array_equal(np.concatenate([r["images"] for r in rows]), batch["images"])
        assert [key for r in rows for key in r["keys"]] == batch["keys"]
    with pytest.raises(ValueError, match="3 processes cannot share evenly"):
        open_loader(config, 4, 1, 0, 3)


def test_worker_processes_do_not_change_the_order(tmp_path):
    config = write_data("webdataset", tmp_path)
    with open_loader(config) as loader:
        take(loader, 2)
        state, expected = loader.state(), take(loader, 5)
    with open_loader(small("webdataset", config.path, num_workers=2)) as loader:
        loader.restore(state)
        assert_same(take(loader, 5), expected)


def test_any_batch_can_be_had_at_once(tmp_path):
    config = write_data("folder", tmp_path)
    with open_loader(config) as loader:
        batches = take(loader, 4)
        assert_same([loader.batch(n) for n in (3, 0)], [batches[3], batches[0]])
        assert loader.state()["batch"] == 4


def test_only_the_samples_named_are_used(tmp_path):
    config = write_data("folder", tmp_path)
    source = open_source(config)
    with open_loader(config, samples=np.array([1, 4, 7])) as loader:
        keys = {key for batch in take(loader, 6) for key in batch["keys"]}
    assert keys == {source.key(n) for n in (1, 4, 7)}


def test_a_state_of_other_data_is_refused(tmp_path):
    config = write_data("folder", tmp_path)
    state = open_loader(config).state()
    for other, name in (
        (open_loader(config, 2), "batch_size 4, and this run has 2"),
        (open_loader(config, 4, 2), "seed 1, and this run has 2"),
        (open_loader(small("folder", config.path, shuffle=False)), "shuffle True"),
        (open_loader(config, samples=np.arange(12)), "num_samples 13"),
        (open_loader(small("folder", config.path, resolution=128), multiple=32), "buckets"),
    ):
        with pytest.raises(ValueError, match=name):
            other.restore(state)


def test_an_image_that_breaks_in_the_middle_is_named(tmp_path):
    config = small("folder", write_data("folder", tmp_path).path, shuffle=False)
    path = tmp_path / "b" / "008.png"
    path.write_bytes(path.read_bytes()[:200])  # its header is whole
    with open_loader(config, 1) as loader:
        good = 0
        with pytest.raises(ValueError, match=r"image b/008\.png cannot be read"):
            while True:
                next(loader)
                good += 1
        assert loader.state()["batch"] == good < 13
        path.write_bytes(encoded(picture(8, *SHAPES[2])))
        assert next(loader)["keys"] == ["b/008.png"]  # mended, it goes on


def test_closing_ends_the_threads(tmp_path):
    config = write_data("folder", tmp_path)
    before = set(threading.enumerate())
    loader = open_loader(config)
    take(loader, 2)
    assert set(threading.enumerate()) - before
    loader.close()
    loader.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
    assert not set(threading.enumerate()) - before


def test_without_grain_the_extra_is_named(tmp_path, monkeypatch):
    config = write_data("folder", tmp_path)
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r"pip install 'k3jax\[train\]'"):
        next(open_loader(config))
