# SPDX-License-Identifier: Apache-2.0
"""Memory, overlap and the rate of writing, measured.

K3JAX_PROOF_PROMPTS (100000), K3JAX_PROOF_IMAGES (400) and K3JAX_PROOF_SECONDS (20) set the scale.
"""

import os
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from k3jax import Kandinsky3Pipeline
from k3jax.sampling.samplers import make_sampler
from k3jax.sharding import make_mesh
from k3jax.synthesis import engine, run
from k3jax.synthesis.batches import batch_shard, texts_of
from k3jax.synthesis.run import RunOptions
from k3jax.synthesis.samples import Sample
from k3jax.synthesis.store import store_at

import data_sets
import stub_pipeline


PROMPTS = int(os.environ.get("K3JAX_PROOF_PROMPTS", "100000"))
IMAGES = int(os.environ.get("K3JAX_PROOF_IMAGES", "400"))
SECONDS = float(os.environ.get("K3JAX_PROOF_SECONDS", "20"))

pytestmark = pytest.mark.slow


def resident(pid) -> int:
    """Memory of a process in MB."""
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmRSS"))


def test_memory_stays_flat(tmp_path, checkpoint):
    """With a pipeline without a model, so that 100,000 samples take minutes."""
    path = tmp_path / "prompts.txt"
    with open(path, "w") as file:
        for number in range(PROMPTS):
            file.write(f"prompt number {number} of a long file, with some words in it\n")
    script = [sys.executable, stub_pipeline.__file__, "0", "synthesize", path, tmp_path / "out"]
    script += ["--size", "64x64", "--batch-size", "50", "--checkpoint", checkpoint]
    script += ["--samples-per-shard", str(max(1, PROMPTS // 100))]
    process = subprocess.Popen([str(word) for word in script], env=data_sets.environment())
    seen = []
    while process.poll() is None:
        shards = len(list((tmp_path / "out" / "metadata").glob("0*")))
        try:
            seen.append((shards, resident(process.pid)))
        except (FileNotFoundError, StopIteration):
            break
        time.sleep(0.1)
    assert process.wait() == 0
    early = max(memory for shards, memory in seen if 10 <= shards <= 30)
    late = max(memory for shards, memory in seen if shards >= 80)
    print(f"\n{PROMPTS} prompts: {early} MB after a tenth, {late} MB at the end")
    assert late < early + 32


def test_the_devices_hardly_wait(tmp_path, checkpoint, capsys):
    """Wall time of a run against that of the same calls with nothing around them."""
    from k3jax.cli.main import main

    mesh = make_mesh("data=1", jax.local_devices()[:1])
    pipe = Kandinsky3Pipeline.from_pretrained(checkpoint, mesh=mesh, dtype="float32", batch_size=4)
    words = ["--size", "128x128", "--steps", "25", "--dtype", "float32", "--checkpoint", checkpoint]
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {k}" for k in range(40)))
    prompts = ["synthesize", tmp_path / "p.txt", tmp_path / "first", *words]

    def call(batch, embeds):
        return pipe(
            prompt_embeds=embeds,
            seed=[s.seed for s in batch.samples],
            guidance_scale=[s.guidance_scale for s in batch.samples],
            height=128,
            width=128,
            num_inference_steps=25,
            output_type="np",
            progress_bar=False,
        )

    def plan(shard, count):
        samples = [
            Sample(k, str(k), k, f"prompt {k}", None, k, 128, 128, 3.0)
            for k in range(shard * count, (shard + 1) * count)
        ]
        return batch_shard(shard, samples, 4, make_sampler(pipe.config.sampler))

    def alone(plans):
        start = time.monotonic()
        for one in plans:
            texts = texts_of(one)
            embeds = pipe.encode_prompt(texts)
            for batch in one.batches:
                rows = np.array([texts.index(s.prompt) for s in batch.samples])
                call(batch, embeds[rows])
        return time.monotonic() - start

    alone([plan(0, 4)])  # compiles
    count = max(8, int(SECONDS / alone([plan(0, 4)]) * 4) // 40 * 8)
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {k}" for k in range(5 * count)))
    ratios = []
    for number in range(3):
        before = alone([plan(shard, count) for shard in range(5)])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("k3jax.synthesis.weights.loader", lambda *_: lambda parts: pipe)
            patch.setattr("jax.local_devices", lambda: list(mesh.devices.flat))
            walls = []
            real = engine.Engine.run

            def timed(self, walls=walls, real=real):
                start = time.monotonic()
                result = real(self)
                walls.append(time.monotonic() - start)
                return result

            patch.setattr(engine.Engine, "run", timed)
            prompts[2] = tmp_path / f"out{number}"
            more = ["--batch-size", "4", "--samples-per-shard", count]
            assert main([str(word) for word in [*prompts, *more]]) == 0
        after = alone([plan(shard, count) for shard in range(5)])
        ratios.append(walls[0] / ((before + after) / 2))
    with capsys.disabled():
        shown = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"\n{5 * count} images, devices alone {before:.1f} s; run / alone: {shown}")
    assert min(ratios) <= 1.10


@pytest.mark.parametrize(
    "kind, image_format, least",
    [
        ("webdataset", ["jpeg"], 50),
        ("parquet", ["jpeg"], 50),
        ("files", ["jpeg"], 50),
        ("webdataset", ["webp"], 0),
        ("webdataset", ["webp", "--lossless"], 0),
        ("webdataset", ["png"], 0),
    ],
)
def test_the_rate_of_writing(tmp_path, checkpoint, capsys, monkeypatch, kind, image_format, least):
    """Images of 1024x1024 that cost nothing to make, encoded and written."""
    from k3jax.cli.main import main

    count = IMAGES if least else max(16, IMAGES // 8)
    pictures = photographs(8)

    class Ready(stub_pipeline.StubPipeline):
        def __call__(self, seed, **rest):
            return type("Output", (), {"images": [pictures[s % len(pictures)] for s in seed]})

    monkeypatch.setattr(stub_pipeline, "StubPipeline", Ready)
    stub_pipeline.install(monkeypatch.setattr)
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {k}" for k in range(count)))
    words = ["synthesize", tmp_path / "p.txt", tmp_path / "out", "--checkpoint", checkpoint]
    words += ["--size", "1024x1024", "--batch-size", "8", "--format", kind]
    words += ["--image-format", *image_format, "--samples-per-shard", max(8, count // 4)]
    walls = []
    real = engine.Engine.run

    def timed(self):
        start = time.monotonic()
        result = real(self)
        walls.append(time.monotonic() - start)
        return result

    monkeypatch.setattr(engine.Engine, "run", timed)
    assert main([str(word) for word in words]) == 0
    size = sum(path.stat().st_size for path in (tmp_path / "out" / "data").rglob("*"))
    rate = count / walls[0]
    with capsys.disabled():
        name = " ".join([kind, *image_format])
        print(f"\n{name}: {rate:.1f} images/s, {size / count / 1024:.0f} KiB an image")
    assert rate >= least


def photographs(count):
    """Smooth shapes with the noise of a camera, float32 (1024, 1024, 3)."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        small = rng.random((33, 33, 3)).astype(np.float32)
        step = np.linspace(0, 31.999, 1024)
        low, share = step.astype(int), (step % 1).astype(np.float32)[:, None, None]
        rows = small[low] * (1 - share) + small[low + 1] * share
        share = share[:, 0][None]
        image = rows[:, low] * (1 - share) + rows[:, low + 1] * share
        noise = rng.normal(0, 2 / 255, image.shape).astype(np.float32)
        made.append(np.clip(image + noise, 0, 1))
    return made


def test_an_index_of_many_prompts_is_small(tmp_path):
    """A file is read once, at the rate that is printed; its index is smaller than the file."""
    from k3jax.synthesis.prompt_index import INDEX, PromptSource
    from k3jax.synthesis.samples import RowRules

    path = tmp_path / "p.jsonl"
    with open(path, "w") as file:
        for k in range(PROMPTS):
            file.write(f'{{"id": "sample-{k}", "prompt": "prompt number {k} of a long file"}}\n')
    source = PromptSource([str(path)], RowRules(0, 1, 1024, 1024, 3.0, None, 64))
    start = time.monotonic()
    index = source.scan()
    seconds = time.monotonic() - start
    index.save(store_at(str(tmp_path)))
    size = (tmp_path / INDEX).stat().st_size
    print(f"\n{PROMPTS / seconds:.0f} rows/s, index of {size} bytes")
    assert index.rows == PROMPTS and size < 10_000 + 25 * PROMPTS
    start = time.monotonic()
    (row,) = index.read(PROMPTS - 1, PROMPTS)
    assert row.id == f"sample-{PROMPTS - 1}" and time.monotonic() - start < 1
    assert store_at(str(tmp_path)).exists("p.jsonl") and isinstance(RunOptions(), run.RunOptions)
