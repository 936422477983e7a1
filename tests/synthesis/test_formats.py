# SPDX-License-Identifier: Apache-2.0
"""Each format is read by the libraries that it is made for; its bytes are the same each time."""

import hashlib
import io
import json
import tarfile

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from k3jax.synthesis.image_formats import ImageFormat, encode_image

from data_sets import contents, write_jsonl


PROMPTS = [
    {"id": "a/b.c", "prompt": "one"},
    {"id": "кот", "prompt": "рыжий кот", "negative_prompt": "dull"},
    {"id": "x" * 300, "prompt": "three", "width": 64, "height": 128},
    {"id": "four", "prompt": "four"},
    {"id": "five", "prompt": "five nan"},
]


@pytest.fixture
def data_set(tmp_path, made, stubs, datasets_cache):
    """Makes a data set of PROMPTS in two shards."""
    prompts = write_jsonl(tmp_path / "prompts.jsonl", PROMPTS)

    def make(kind, name="out", **flags):
        words = [word for flag, value in flags.items() for word in (f"--{flag}", value)]
        made(
            *("synthesize", prompts, tmp_path / name, "--format", kind, "--size", "64x64"),
            *("--samples-per-shard", "3", "--seed", "5", *words),
        )
        return tmp_path / name

    return make


def sidecars(out):
    return [row for p in sorted(out.glob("metadata/*")) for row in pq.read_table(p).to_pylist()]


def test_sidecar(data_set):
    rows = sidecars(data_set("webdataset"))
    assert [row["id"] for row in rows] == [row["id"] for row in PROMPTS]
    assert [row["index"] for row in rows] == list(range(5))
    good, bad = rows[1], rows[4]
    assert good["prompt"] == "рыжий кот" and good["negative_prompt"] == "dull"
    assert good["steps"] == 2 and good["sampler"] == "kandinsky" and good["guidance_scale"] == 3
    assert (good["width"], good["height"], good["tokens"], good["line"]) == (64, 64, 3, 2)
    assert good["prompt_cut"] is False and bad["prompt_cut"] is False
    assert good["status"] == "ok" and good["reason"] is None and 0 < good["seed"] < 2**63
    assert bad["status"] == "failed" and bad["sha256"] is None
    assert bad["reason"] == "1 of the image's 12288 values are not finite"


def test_webdataset(data_set):
    out = data_set("webdataset")
    rows = {row["key"]: row for row in sidecars(out)}
    urls = sorted(str(path) for path in out.glob("data/*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert len(samples) == 4 and len(urls) == 2
    for sample in samples:
        row = rows[sample["__key__"]]
        assert sample["json"]["id"] == row["id"] and sample["json"]["seed"] == row["seed"]
        assert sample["jpg"].size == (row["width"], row["height"])
    for url in urls:
        with tarfile.open(url) as archive:
            for member in archive:
                assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
                assert member.name.isascii() and len(member.name) <= 100
                if member.name.endswith(".jpg"):
                    content = archive.extractfile(member).read()
                    row = rows[member.name.split(".")[0]]
                    assert hashlib.sha256(content).hexdigest() == row["sha256"]
    loaded = datasets.load_dataset("webdataset", data_files=urls, split="train")
    assert loaded[0]["jpg"].size == (64, 64) and loaded[0]["json"]["id"] == "a/b.c"


def test_parquet(data_set):
    out = data_set("parquet", **{"image-format": "png"})
    rows = {row["key"]: row for row in sidecars(out)}
    table = pq.read_table(sorted(out.glob("data/*.parquet")))
    assert table.num_rows == 4
    for row in table.to_pylist():
        assert hashlib.sha256(row["image"]["bytes"]).hexdigest() == rows[row["key"]]["sha256"]
    for loaded in (
        datasets.load_dataset("parquet", data_files=str(out / "data" / "*"), split="train"),
        datasets.load_dataset(str(out), split="train"),  # by the data set's own README.md
    ):
        assert isinstance(loaded.features["image"], datasets.Image)
        image = next(row["image"] for row in loaded if row["id"] == "x" * 300)
        assert image.size == (64, 128)


def test_files(data_set):
    out = data_set("files", **{"image-format": "webp"})
    rows = {row["key"]: row for row in sidecars(out)}
    files = sorted(out.glob("data/*/*.webp"))
    assert len(files) == 4
    for file in files:
        content = file.read_bytes()
        assert hashlib.sha256(content).hexdigest() == rows[file.stem]["sha256"]
    loaded = datasets.load_dataset("imagefolder", data_dir=str(out / "data"), split="train")
    assert {row["id"] for row in loaded} == {row["id"] for row in PROMPTS[:4]}
    assert datasets.load_dataset(str(out), split="train").num_rows == 4


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "files"])
def test_the_bytes_are_the_same_each_time(data_set, kind, monkeypatch):
    """Also a year later, in another folder."""
    first = data_set(kind)
    monkeypatch.setattr("time.time", lambda: 4e9)
    second = data_set(kind, "again")
    assert contents(first) == contents(second) and len(contents(first)) >= 4
    manifests = [json.loads((out / "manifest.json").read_text()) for out in (first, second)]
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize(
    "kind, quality, lossless",
    [
        ("jpeg", 95, False),
        ("jpeg", 50, False),
        ("png", None, True),
        ("webp", None, True),
        ("webp", 90, False),
    ],
)
def test_encodings(kind, quality, lossless):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 32, 3)).astype(np.uint8)
    image = pixels.astype(np.float32) / 255
    encoded = encode_image(image, ImageFormat(kind, quality))
    assert encoded == encode_image(image.copy(), ImageFormat(kind, quality))
    assert encoded.sha256 == hashlib.sha256(encoded.content).hexdigest()
    with Image.open(io.BytesIO(encoded.content)) as read:
        assert read.format.lower() == kind and read.size == (32, 64)
        same = np.array_equal(np.asarray(read.convert("RGB")), pixels)
    assert same == lossless


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--image-format", "jpeg", "--lossless"], "JPEG is never lossless"),
        (["--image-format", "png", "--quality", "3"], "PNG has no quality"),
        (["--quality", "0"], "quality is 0; it must be between 1 and 100"),
        (["--image-format", "webp", "--quality", "3", "--lossless"], "exclude each other"),
        (["--samples-per-shard", "0"], "samples_per_shard is 0; it must be 1 or more"),
        (["--images-per-prompt", "-1"], "num_images_per_prompt is -1"),
        (["--size", "1024"], "size '1024' is not WIDTHxHEIGHT"),
        (["--size", "100x100"], "height is 100; it must be a positive multiple of 8"),
        (["--buckets", "64x64,60x60"], "height is 60; it must be a positive multiple of 8"),
        (["--steps", "0"], "num_inference_steps is 0"),
        (["--guidance-scale", "-1"], "guidance_scale is -1.0; it must be 0 or more"),
        (["--mesh", "rows=1"], "'rows=1' is not AXIS=SIZE"),
        (["--batch-size", "0.5"], "argument --batch-size: invalid int value"),
        (["--column", "prompt"], "--column 'prompt' is not NAME=THEIRS"),
        (["--max-sizes", "1"], "the prompts have 2 sizes, each of them a program to compile"),
        (["--lora-scale", "2"], "--lora-scale is the strength of a LoRA"),
        (["--jobs", "2"], "--jobs is 2: give the number of this one with --job"),
        (["--checkpoint", "none"], "There is no checkpoint at"),
        (["--config", "flash"], "the config's checkpoint weights/flash does not exist"),
    ],
)
def test_refusals(tmp_path, run, refuses, monkeypatch, words, reason):
    monkeypatch.chdir(tmp_path)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", PROMPTS)
    if words[0] == "--config":
        from k3jax.cli.main import main

        assert main(["synthesize", str(prompts), str(tmp_path / "out"), *words]) == 2
    else:
        assert reason in refuses("synthesize", prompts, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()
