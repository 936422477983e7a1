# SPDX-License-Identifier: Apache-2.0
"""Latents and embeddings on disk: what is stored, interruptions, and batches made of it."""

import json
import threading
import types

import numpy as np
import pytest

from k3jax.training.data.buckets import bucket_index
from k3jax.training.data.latent_cache import CachedLoader, LatentCache, cache_folder
from k3jax.training.data.latent_cache_writer import cache_fingerprint, write_cache
from k3jax.training.data.loader import Loader
from k3jax.training.data.open_source import open_source

from data_sources import KINDS, assert_same, small, take, write_data


pytestmark = pytest.mark.filterwarnings("ignore::k3jax.training.data.buckets.EnlargedWarning")

WIDTH = 8
STOP = "stop"


class Encoders:
    """Stand-ins for the networks; they count what they are given and stop when they are told to."""

    def __init__(self, stop_after: int | None = None):
        self.images, self.captions, self.left = 0, [], stop_after

    def call(self):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError(STOP)

    def encode_images(self, images):
        self.call()
        assert images.dtype == np.uint8 and len(images) == 3
        self.images += 1
        b, h, w, _ = images.shape
        rgb = images.reshape(b, h // 8, 8, w // 8, 8, 3).mean((2, 4))
        return np.concatenate([rgb / 255, rgb[..., :1] / 255], -1).astype(np.float32)

    def encode_texts(self, captions):
        self.call()
        assert len(captions) == 3
        self.captions += captions
        return prompt_embeds(captions)


def prompt_embeds(captions, rows: int = 128):
    tokens = np.array([num_tokens(caption) for caption in captions])
    embeds = np.stack([embedding(caption, rows) for caption in captions])
    mask = np.arange(rows) < tokens[:, None]
    lengths = np.minimum(tokens + 1, 128).astype(np.int32)
    return types.SimpleNamespace(embeds=embeds, attention_mask=mask, lengths=lengths)


def num_tokens(caption: str) -> int:
    return min(128, 2 + sum(caption.encode()) * 7 % 40)


def embedding(caption: str, rows: int) -> np.ndarray:
    seed = list(caption.encode())
    return np.random.default_rng(seed).normal(size=(rows, WIDTH)).astype(np.float32)


def open_data(kind, folder, **more):
    config = write_data(kind, folder)
    config = small(kind, config.path, caption_column=config.caption_column, **more)
    source = open_source(config)
    return config, source, bucket_index(source, config, 32)


def precompute(cache, source, index, encoders=None, **more) -> Encoders:
    encoders = encoders or Encoders()
    more = {"shard_size": 5, **more}
    encode = (encoders.encode_images, encoders.encode_texts)
    write_cache(cache, source, index, *encode, batch_size=3, **more)
    return encoders


def content(folder) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    return open_data("folder", tmp_path / "data", resolution=128)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_those_of_the_loader_encoded(kind, dtype, tmp_path):
    (tmp_path / "data").mkdir()
    config, source, index = open_data(kind, tmp_path / "data", resolution=128)
    cache = LatentCache(tmp_path / "cache", "x")
    precompute(cache, source, index, dtype=dtype)
    with (
        Loader(source, config, 3, 7, index=index) as plain,
        CachedLoader(cache, 3, 7) as cached,
    ):
        for _ in range(12):
            expected, batch = next(plain), next(cached)
            assert batch["keys"] == expected["keys"]
            latents = Encoders().encode_images(expected["images"]).astype(dtype)
            assert batch["latents"].dtype == batch["embeds"].dtype == dtype
            np.testing.assert_array_equal(batch["latents"], latents)
            texts = prompt_embeds(expected["captions"])
            rows = batch["embeds"].shape[1]
            assert rows == (32 if texts.lengths.max() <= 32 else 64)
            np.testing.assert_array_equal(batch["attention_mask"], texts.attention_mask[:, :rows])
            np.testing.assert_array_equal(batch["lengths"], texts.lengths)
            assert batch["lengths"].dtype == np.int32
            seen = np.arange(rows) < texts.lengths[:, None]
            expected_embeds = np.where(seen[..., None], texts.embeds[:, :rows], 0).astype(dtype)
            np.testing.assert_array_equal(batch["embeds"], expected_embeds)


def test_equal_captions_are_encoded_once_and_stored_without_padding(data, tmp_path):
    _, source, index = data
    cache = LatentCache(tmp_path / "cache", "x")
    encoders = precompute(cache, source, index)
    captions = list(dict.fromkeys(source.caption(n) for n in range(13)))
    assert len(captions) == 11
    assert sorted(set(encoders.captions)) == sorted(captions)
    stored = [np.load(path) for path in sorted((tmp_path / "cache/texts").glob("*.npy"))]
    assert sum(len(rows) for rows in stored) == sum(num_tokens(c) + 1 for c in captions)


def test_long_captions_fill_the_window(tmp_path):
    (tmp_path / "data").mkdir()
    _, source, index = open_data("folder", tmp_path / "data", resolution=128)

    def texts(captions):
        embeds = prompt_embeds(captions)
        embeds.attention_mask[:] = True
        embeds.lengths[:] = 128
        return embeds

    cache = LatentCache(tmp_path / "cache", "x")
    write_cache(cache, source, index, Encoders().encode_images, texts, 3)
    with CachedLoader(cache, 3, 0) as loader:
        batch = next(loader)
    assert batch["embeds"].shape == (3, 128, WIDTH)
    assert batch["attention_mask"].all() and (batch["lengths"] == 128).all()


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_run_from_a_cache_goes_on_exactly_where_it_stopped(shuffle, data, tmp_path):
    cache = LatentCache(tmp_path / "cache", "x")
    precompute(cache, *data[1:])

    def loader(*place):
        return CachedLoader(cache, 4, 3, *place, shuffle=shuffle)

    with loader() as first:
        whole = take(first, 10)
    for stop in (0, 1, 5):
        with loader() as first, loader() as second:
            take(first, stop)
            next(second)
            second.restore(json.loads(json.dumps(first.state())))
            assert_same(take(second, 10 - stop), whole[stop:])
    with loader(0, 2) as left, loader(1, 2) as right:
        for expected, *parts in zip(whole, take(left, 10), take(right, 10), strict=True):
            for name in ("latents", "embeds", "attention_mask", "lengths"):  # of one padded width
                joint = np.concatenate([part[name] for part in parts])
                np.testing.assert_array_equal(joint, expected[name])


def test_an_interrupted_cache_is_finished_without_doing_anything_twice(data, tmp_path):
    _, source, index = data
    whole = LatentCache(tmp_path / "whole", "x")
    calls = precompute(whole, source, index)
    total = calls.images + len(calls.captions) // 3
    done = 0
    for stop in range(1, total):
        cache = LatentCache(tmp_path / f"{stop}", "x")
        encoders = Encoders(stop_after=stop)
        with pytest.raises(RuntimeError, match=STOP):
            precompute(cache, source, index, encoders)
        assert not cache.complete and not cache.folder.exists()
        with pytest.raises(ValueError, match="is not complete: precompute it first"):
            CachedLoader(cache, 4, 0)
        again = precompute(LatentCache(tmp_path / f"{stop}", "x"), source, index)
        calls_again = again.images + len(again.captions) // 3
        assert total - stop <= calls_again <= total - stop + 1  # a shard is two batches
        done += calls_again < total
        assert content(cache.folder) == content(whole.folder)
    assert done > total // 2
    again = precompute(whole, source, index)
    assert (again.images, again.captions) == (0, [])


def test_what_a_killed_run_left_half_written_is_not_read(data, tmp_path):
    _, source, index = data
    whole = LatentCache(tmp_path / "whole", "x")
    precompute(whole, source, index)
    cache = LatentCache(tmp_path / "cache", "x")
    with pytest.raises(RuntimeError, match=STOP):
        precompute(cache, source, index, Encoders(stop_after=3))
    partial = tmp_path / "cache.partial"
    (partial / "latents" / ".000003.npy.99.part").write_bytes(b"half")
    precompute(cache, source, index)
    assert content(cache.folder) == content(whole.folder)
    assert not partial.exists()


def test_processes_share_the_work(data, tmp_path):
    _, source, index = data
    whole = LatentCache(tmp_path / "whole", "x")
    once = precompute(whole, source, index)
    barrier = threading.Barrier(3)
    encoders = [Encoders() for _ in range(3)]

    def work(process: int) -> None:
        cache = LatentCache(tmp_path / "cache", "x")
        place = {"process_index": process, "process_count": 3, "barrier": barrier.wait}
        precompute(cache, source, index, encoders[process], **place)
        assert cache.complete

    threads = [threading.Thread(target=work, args=(process,)) for process in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert content(tmp_path / "cache") == content(whole.folder)
    assert all(e.images and e.captions for e in encoders)
    assert sum(e.images for e in encoders) == once.images


def test_progress_goes_to_its_end(data, tmp_path):
    _, source, index = data
    seen = []
    cache = LatentCache(tmp_path / "cache", "x")
    precompute(cache, source, index, progress=lambda *numbers: seen.append(numbers))
    assert seen[-1] == (13 + 11, 13 + 11)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_a_cache_of_something_else_is_refused(data, tmp_path):
    config, source, index = data
    fingerprint = cache_fingerprint(source, index, "weights-1")
    cache = LatentCache(tmp_path / "cache", fingerprint)
    with pytest.raises(RuntimeError, match=STOP):
        precompute(cache, source, index, Encoders(stop_after=3))
    with pytest.raises(ValueError, match=r"begun with other settings \(dtype float16, not float32"):
        precompute(cache, source, index, dtype="float32")
    other = cache_fingerprint(source, index, "weights-2")
    assert bucket_index(source, config, 64).buckets != index.buckets
    sizes = cache_fingerprint(source, bucket_index(source, config, 64), "weights-1")
    for wrong, what in ((other, "other weights, task or masks"), (sizes, "other sizes")):
        with pytest.raises(ValueError, match=rf"\.partial was computed from {what} than") as error:
            LatentCache(tmp_path / "cache", wrong)
        assert len(str(error.value)) < 300
    precompute(cache, source, index)
    with pytest.raises(ValueError, match=r"cache was computed from other weights, task or masks"):
        LatentCache(tmp_path / "cache", other)
    LatentCache(tmp_path / "cache", cache_fingerprint(open_source(config), index, "weights-1"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="mine holds other files"):
        LatentCache(tmp_path / "mine", "x")


def test_a_folder_holds_the_caches_of_several_data_sets(data, tmp_path):
    """Also beside one that an older version wrote into the folder itself."""
    _, source, index = data
    root = tmp_path / "cache"
    folders = [cache_folder(root, fingerprint) for fingerprint in ("x", "y")]
    assert folders[0].parent == folders[1].parent == root and folders[0] != folders[1]
    for folder, fingerprint in zip(folders, "xy", strict=True):
        precompute(LatentCache(folder, fingerprint), source, index)
    for place in (root / "old", root / "old.partial"):
        precompute(LatentCache(root / "old", "z"), source, index)
        (root / "old").rename(place)
        assert cache_folder(root / "old", "z") == root / "old"
        assert cache_folder(root / "old", "x").parent == root / "old"
        (place / "manifest.json").write_text("{}")  # damaged: it is not this cache
        assert cache_folder(root / "old", "z").parent == root / "old"
        place.rename(root / place.name.replace("old", "gone"))


def test_values_that_cannot_be_stored_are_refused(data, tmp_path):
    _, source, index = data
    cache = LatentCache(tmp_path / "cache", "x")
    encoders = Encoders()
    for value, message in ((1e6, "too large for float16: cache in float32"), (np.nan, "finite")):

        def images(batch, value=value):
            return encoders.encode_images(batch) * 0 + np.float32(value)

        with pytest.raises(ValueError, match=rf"latents of [ab]/0\d\d\.png, .* {message}"):
            write_cache(cache, source, index, images, encoders.encode_texts, 3)
    with pytest.raises(ValueError, match="float16 or float32, not bfloat16"):
        precompute(cache, source, index, dtype="bfloat16")


def test_a_damaged_cache_is_named(data, tmp_path):
    cache = LatentCache(tmp_path / "cache", "x")
    precompute(cache, *data[1:])
    shard = tmp_path / "cache" / "latents" / "000001.npy"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"latents/000001\.npy cannot be read .* delete the cache"):
        CachedLoader(cache, 4, 0)
    (tmp_path / "cache" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a cache of latents"):
        LatentCache(tmp_path / "cache", "x")
