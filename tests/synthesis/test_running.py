# SPDX-License-Identifier: Apache-2.0
"""How the work goes: what overlaps, what is compiled, what is said, and how it stops."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from k3jax.model.context import PromptEmbeds
from k3jax.synthesis import phases
from k3jax.synthesis.engine import StopRequest
from k3jax.synthesis.phases import Embeddings

import data_sets
import stub_pipeline
from data_sets import contents, write_jsonl


@pytest.fixture
def prompts(tmp_path):
    """40 rows of 20 prompts."""
    rows = [{"id": f"n{k}", "prompt": f"number {k // 2}"} for k in range(40)]
    return write_jsonl(tmp_path / "prompts.jsonl", rows)


@pytest.fixture
def few_objects():
    """Between two phases Python collects garbage, which takes long with all that tests import."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def words(prompts, tmp_path):
    return ["synthesize", prompts, tmp_path / "out", "--size", "64x64", "--samples-per-shard", "8"]


def test_texts_are_encoded_once(words, made, stubs):
    """For repeated prompts and images of a prompt; a shard at a time."""
    made(*words, "--images-per-prompt", "2")
    (stub,) = stubs
    assert len(stub.encoded) == 10 and sum(map(len, stub.encoded)) == 20
    assert sum(len(call["seed"]) for call in stub.calls) == 80


def test_encoding_is_ahead_of_the_devices(words, made, stubs, monkeypatch):
    """While a shard is made, the texts of the next one are encoded, and no more."""
    events = []
    stub = stub_pipeline.StubPipeline
    encode, call = stub.encode_prompt, stub.__call__

    def encode_prompt(self, prompts):
        events.append(("encode", prompts[0], threading.current_thread().name))
        return encode(self, prompts)

    def make(self, *args, **rest):
        time.sleep(0.05)
        events.append(("make", rest["seed"][0], threading.current_thread().name))
        return call(self, *args, **rest)

    monkeypatch.setattr(stub, "encode_prompt", encode_prompt)
    monkeypatch.setattr(stub, "__call__", make)
    made(*words)
    kinds = [kind for kind, *_ in events]
    assert kinds == ["encode", "encode", *["make", "encode"] * 3, "make", "make"]
    names = {kind: {name for k, _, name in events if k == kind} for kind in ("encode", "make")}
    assert names["encode"].isdisjoint(names["make"])


def test_images_are_written_while_others_are_made(words, made, monkeypatch):
    """The run takes as long as the devices: encoders and writer work beside them."""
    from k3jax.synthesis.image_formats import ImageFormat

    stub_pipeline.install(monkeypatch.setattr, seconds=(0.2,))
    real = ImageFormat.encode

    def encode(self, pixels):
        time.sleep(0.05)  # with the GIL released, as Pillow's encoders do
        return real(self, pixels)

    monkeypatch.setattr(ImageFormat, "encode", encode)
    start = time.monotonic()
    made(*words)
    seconds = time.monotonic() - start
    # 5 batches of 8: one second on the devices, another in the encoders.
    assert seconds < 1.7, seconds


def test_alternating_phases(words, made, stubs, tmp_path, few_objects):
    """The encoder and the rest are never in memory together; the bytes are the same."""
    made(*words[:2], tmp_path / "together", *words[3:])
    stubs.clear()
    made(*words, "--phases", "alternate", "--shards-per-phase", "2")
    assert [stub.parts for stub in stubs] == [phases.ENCODER, phases.DENOISER] * 3
    assert all(bool(stub.encoded) != bool(stub.calls) for stub in stubs)
    assert contents(tmp_path / "out") == contents(tmp_path / "together")


def test_nothing_holds_the_weights_between_phases(words, made, monkeypatch, few_objects):
    import weakref

    from k3jax.synthesis import weights

    alive = []

    def loader(weights, settings, devices):
        def load(parts):
            gc.collect()
            assert all(pipe() is None for pipe in alive)
            pipe = stub_pipeline.StubPipeline.on(devices)
            alive.append(weakref.ref(pipe))
            return pipe

        return load

    monkeypatch.setattr(weights, "loader", loader)
    made(*words, "--phases", "alternate", "--shards-per-phase", "2")
    assert len(alive) == 6


@pytest.mark.parametrize("limit, together", [(None, True), (1 << 40, True), (1 << 20, False)])
def test_phases_are_chosen_by_the_memory(
    words, made, stubs, monkeypatch, few_objects, limit, together
):
    from k3jax.synthesis import weights

    real = weights.weights_fit_together

    def fits(checkpoint, settings, used):
        class Device:
            def memory_stats(self):
                return None if limit is None else {"bytes_limit": limit}

        class Mesh:
            devices = np.array([Device()], object)
            shape = used.mesh.shape

        return real(checkpoint, settings, weights.Devices(Mesh, Mesh, used.batch_size))

    monkeypatch.setattr(weights, "weights_fit_together", fits)
    made(*words)
    assert (stubs[0].parts == phases.ALL) == together


def test_embeddings_are_kept_small_and_exact():
    rng = np.random.default_rng(0)
    embeds = rng.standard_normal((3, 128, 64)).astype(np.float32)
    embeds[1] = (embeds[1].view(np.uint32) & 0xFFFF0000).view(np.float32)  # as bfloat16 has it
    mask = np.arange(128)[None] < np.array([[5], [128], [1]])
    lengths = np.array([6, 128, 2], np.int32)
    kept = Embeddings()
    kept.add(["a", "b", "c"], PromptEmbeds(embeds, mask, lengths), [5, 129, 1])
    found = kept.of(["c", "a", "b", "a"])
    order = [2, 0, 1, 0]
    np.testing.assert_array_equal(found.embeds, np.where(mask[..., None], embeds, 0)[order])
    np.testing.assert_array_equal(found.attention_mask, mask[order])
    np.testing.assert_array_equal(found.lengths, lengths[order])
    assert [kept.tokens(text) for text in "abc"] == [5, 128, 1]
    assert [kept.is_cut(text) for text in "abc"] == [False, True, False]
    assert [kept._rows[text].nbytes for text in "abc"] == [5 * 64 * 4, 128 * 64 * 2, 64 * 4]


def test_few_shapes(tmp_path, made, stubs):
    """Sizes in buckets, and batches of one size whatever is in them."""
    rows = [{"prompt": "a", "width": 64 + 8 * k, "height": 64} for k in range(20)]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    words = ["synthesize", path, tmp_path / "out", "--buckets", "64x64,128x64,192x64"]
    made(*words)
    assert {(c["width"], c["height"]) for c in stubs[0].calls} == {(64, 64), (128, 64), (192, 64)}
    made("verify", tmp_path / "out")


def test_metrics(words, tmp_path, made, stubs):
    (prompts := words[1]).write_text(prompts.read_text() + '{"prompt": "nan"}\n')
    made(*words, "--job", "1", "--jobs", "2", "--prometheus", tmp_path / "k3jax.prom")
    lines = (tmp_path / "out" / "metrics" / "worker-00001-of-00002.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    assert [line["shard"] for line in lines] == [f"data/{k:06d}.tar" for k in (1, 3, 5)]
    assert [line["images"] for line in lines] == [8, 8, 0]
    assert [line["failed"] for line in lines] == [0, 0, 1]
    assert lines[-1]["share_samples_finished"] == lines[-1]["share_samples"] == 17
    assert lines[0]["images_per_second"] > 0 and lines[0]["eta_seconds"] > 0
    text = (tmp_path / "k3jax.prom").read_text()
    values = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels["worker"] == "1"
    }
    assert values["k3jax_images_total"] == 16 and values["k3jax_failed_samples_total"] == 1
    assert values["k3jax_shards_total"] == 3 and values["k3jax_eta_seconds"] == 0


def test_the_progress_bar(words, capsys):
    """On a terminal: images, rate, time to go and failures."""
    from k3jax.synthesis.progress import Progress

    with Progress(10, 4, {}, bar=True) as progress:
        progress.start()
        progress.sample(failed=False)
        progress.sample(failed=True)
        progress._bar.refresh()
        bar = str(progress._bar)
    assert "6/10" in bar and "image/s" in bar and "failed=1" in bar and "<" in bar


def test_a_stop_knows_its_time():
    stop = StopRequest(10)
    assert stop.leaves_time_for(1e9)
    stop.request("SIGTERM")
    assert stop.leaves_time_for(5) and not stop.leaves_time_for(9.5)
    assert stop.exit_code == 143


def start(words, checkpoint, seconds, *more):
    """A run in a process of its own, its first shard finished."""
    script = [sys.executable, stub_pipeline.__file__, seconds, *words, "--checkpoint", checkpoint]
    process = subprocess.Popen(
        [str(word) for word in [*script, *more]],
        env=data_sets.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "data/000000.tar: 8 images\n"
    return process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal(words, tmp_path, run, made, stubs, monkeypatch, name):
    """In this process: the shard that is being made is finished, and no other is begun."""
    call = stub_pipeline.StubPipeline.__call__

    def interrupted(self, *args, **rest):
        if len(self.calls) == 1:  # in the second shard
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(0.2)
        return call(self, *args, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(stub_pipeline.StubPipeline, "__call__", interrupted)
        code, out, err = run(*words, "--grace", "60")
    assert code == (143 if name == "SIGTERM" else 130), err
    assert out == ["data/000000.tar: 8 images", "data/000001.tar: 8 images"]
    assert "stopped: 16 images " in err[-1] and len(contents(tmp_path / "out")) == 4
    assert len(made(*words)[0]) == 3
    made("verify", tmp_path / "out")


def test_a_signal_without_time(words, tmp_path, run, stubs, monkeypatch):
    """In this process: the shard is abandoned between two batches; nothing of it stays."""
    monkeypatch.setattr("k3jax.synthesis.engine.FINISH_SECONDS", 1000)
    call = stub_pipeline.StubPipeline.__call__

    def interrupted(self, *args, **rest):
        if len(self.calls) == 2:  # the first batch of the second shard
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        return call(self, *args, **rest)

    monkeypatch.setattr(stub_pipeline.StubPipeline, "__call__", interrupted)
    words = [*words[:-1], "16", "--batch-size", "8", "--guidance-scale", "1", "--grace", "60"]
    code, out, _ = run(*words)
    assert code == 143 and out == ["data/000000.tar: 16 images"]
    assert len(contents(tmp_path / "out")) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_with_time_to_finish(words, tmp_path, made, checkpoint, stubs, name):
    """The shard that is being made is finished, and no other is begun."""
    process = start(words, checkpoint, "0.1", "--grace", "60")
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == (143 if name == "SIGTERM" else 130), err
    assert out == "data/000001.tar: 8 images\n"
    assert "stopping within 60 s" in err and "stopped: 16 images " in err
    assert len(contents(tmp_path / "out")) == 4
    made("synthesize", *words[1:])
    made("verify", tmp_path / "out")


@pytest.mark.slow
def test_a_signal_without_time_to_finish(words, tmp_path, checkpoint):
    """The shard is abandoned between two batches; nothing of it stays."""
    process = start(words, checkpoint, "0.4", "--grace", "2")
    began = time.monotonic()
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and time.monotonic() - began < 4, err
    assert sorted(contents(tmp_path / "out")) == ["data/000000.tar", "metadata/000000.parquet"]


@pytest.mark.slow
def test_a_signal_in_the_middle_of_a_long_batch(words, tmp_path, checkpoint):
    """Devices cannot be interrupted: the process leaves them, in time, and cleans up."""
    process = start(words, checkpoint, "0.1,30", "--grace", "2")
    time.sleep(0.5)
    began = time.monotonic()
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and time.monotonic() - began < 4, err
    assert "the shard that was being made will be made again" in err
    assert sorted(contents(tmp_path / "out")) == ["data/000000.tar", "metadata/000000.parquet"]
