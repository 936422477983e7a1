# SPDX-License-Identifier: Apache-2.0
"""The data card: what a data set says of itself, to people, to the hub and to `load_dataset`."""

import dataclasses
import json
import re

import datasets
import pytest
import yaml

from k3jax.synthesis.card import data_card
from k3jax.synthesis.run_manifest import read_manifest
from k3jax.synthesis.store import store_at

from data_sets import write_jsonl


ROWS = [{"id": f"n{k}", "prompt": f"number {k}"} for k in range(4)]
FORMATS = {
    "webdataset": ("data/*.tar", "jpg"),
    "parquet": ("data/*.parquet", "image"),
    "files": ("data/*/*", "image"),
}
"""Format -> its files, and the column with the image."""


@pytest.fixture
def make(tmp_path, made, stubs, datasets_cache):
    """Makes a data set of ROWS and one prompt that fails."""
    prompts = write_jsonl(tmp_path / "my prompts.jsonl", [*ROWS, {"id": "bad", "prompt": "nan"}])

    def call(name="out", kind="webdataset", *words):
        made(
            *("synthesize", prompts, tmp_path / name, "--format", kind, "--size", "64x64"),
            *("--samples-per-shard", "3", *words),
        )
        return tmp_path / name

    return call


def top(card: str) -> dict:
    """The YAML block of a card."""
    _, block, text = card.split("---\n", 2)
    assert text.lstrip().startswith("# ")
    return yaml.safe_load(block)


@pytest.mark.parametrize("kind", FORMATS)
def test_load_dataset_reads_the_folder_by_its_card(make, kind):
    out = make("out", kind)
    files, column = FORMATS[kind]
    values = top((out / "README.md").read_text())
    assert [config["data_files"] for config in values["configs"]] == [files]
    loaded = datasets.load_dataset(str(out), split="train")
    assert loaded.num_rows == 4 and loaded[0][column].size == (64, 64)
    metadata = str(out / "metadata" / "*.parquet")
    asked = datasets.load_dataset("parquet", data_files=metadata, split="train")
    assert asked["status"][:] == ["ok"] * 4 + ["failed"]
    assert asked["prompt"][:][:4] == [row["prompt"] for row in ROWS]


def test_what_it_says(make, checkpoint):
    out = make("out", "parquet", "--seed", "5", "--quality", "80")
    text = (out / "README.md").read_text()
    values, manifest = top(text), json.loads((out / "manifest.json").read_text())
    assert values["size_categories"] == ["n<1K"] and values["task_categories"] == ["text-to-image"]
    assert "synthetic" in values["tags"] and values["license"] == "unknown"
    assert manifest["weights"]["fingerprint"] in text
    assert manifest["prompts"]["files"][0]["sha256"] in text
    for words in (
        "# 5 images by k3jax",
        "2 shards of 3 samples in the format\nparquet (jpeg, quality 80)",
        "5 prompts with\n1 image each",
        "64x64 pixels",
        "2 steps of kandinsky",
        "Run seed 5",
        "Tasks: text to image.",
        f"k3jax {manifest['versions']['k3jax']}",
    ):
        assert words in text


def test_it_tells_no_place_and_is_the_same_anywhere(make, tmp_path, checkpoint, monkeypatch):
    first = (make() / "README.md").read_bytes()
    monkeypatch.setattr("time.time", lambda: 4e9)
    assert first == (make("again") / "README.md").read_bytes()
    for place in (tmp_path, checkpoint, "my prompts"):
        assert str(place) not in first.decode()


def test_what_people_write_stays(make, made):
    out = make()
    written = out / "README.md"
    written.write_text(written.read_text().replace('"unknown"', '"cc0-1.0"') + "Our words.\n")
    before = written.read_bytes()
    make()  # the same command again
    assert written.read_bytes() == before
    assert "as they should be" in made("verify", out)[0][-1]
    made("verify", out, "--repair")
    assert written.read_bytes() == before
    written.unlink()
    assert "as they should be" in made("verify", out)[0][-1]


@pytest.mark.parametrize(
    "rows, category",
    [
        (999, "n<1K"),
        (1000, "1K<n<10K"),
        (9_999_999, "1M<n<10M"),
        (10**12 - 1, "100B<n<1T"),
        (10**12, "n>1T"),
    ],
)
def test_size_categories_of_the_hub(make, rows, category):
    manifest = read_manifest(store_at(str(make())))
    larger = dataclasses.replace(manifest, prompts={**manifest.prompts, "rows": rows})
    assert top(data_card(larger))["size_categories"] == [category]


def test_other_runs(make):
    manifest = read_manifest(store_at(str(make())))
    settings = dataclasses.replace(
        manifest.settings, quality=None, guidance_interval=(0, 24), int8_text_encoder=True
    )
    many = manifest.prompts["files"] * 10
    text = data_card(
        dataclasses.replace(
            manifest,
            settings=settings,
            weights={**manifest.weights, "lora": "0123", "lora_scale": 0.5},
            prompts={**manifest.prompts, "files": many, "tasks": ["image", "inpaint"]},
        )
    )
    assert top(text)["task_categories"] == ["image-to-image"]
    assert "Tasks: image to image, inpainting." in text
    for words in (
        "lossless",
        "guidance_interval [0, 24]",
        "encoder's in int8",
        "LoRA `0123` at 0.5",
    ):
        assert words in text
    assert len(re.findall("with sha256", text)) == 8 and "and 2 files more" in text
