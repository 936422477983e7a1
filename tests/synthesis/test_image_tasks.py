# SPDX-License-Identifier: Apache-2.0
"""Rows that start from images, with the small model: as the pipelines make them, and audited."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from k3jax import Kandinsky3Pipeline
from k3jax.img2img import Kandinsky3Img2ImgPipeline
from k3jax.inpaint import Kandinsky3InpaintPipeline
from k3jax.synthesis.image_task import read_inputs
from k3jax.synthesis.samples import Sample

from data_sets import write_jsonl


SETTINGS = ["--size", "64x64", "--dtype", "float32", "--image-format", "png", "--steps", "4"]
ROWS = [
    {"id": "changed", "prompt": "a red circle", "image": "in/square.png", "strength": 0.5},
    {"id": "wide", "prompt": "a red circle", "image": "in/wide.jpg", "strength": 0.5},
    {"id": "masked", "prompt": "a cat", "image": "in/square.png", "mask": "in/mask.png"},
    {"id": "gone", "prompt": "a cat", "image": "in/none.png", "strength": 0.5},
    {"id": "text", "prompt": "no image at all"},
    {"id": "broken", "prompt": "a cat", "image": "in/broken.png", "strength": 0.5},
    {"id": "other", "prompt": "a cat", "image": "in/wide.jpg", "mask": "in/mask.png"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """ROWS and the images that they name."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "in").mkdir()
    rng = np.random.default_rng(0)

    def picture(width, height):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        return small.resize((width, height), Image.Resampling.BICUBIC)

    picture(64, 64).save(folder / "in" / "square.png")
    picture(200, 100).save(folder / "in" / "wide.jpg")
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save(folder / "in" / "mask.png")
    (folder / "in" / "broken.png").write_bytes(b"PNG")
    write_jsonl(folder / "rows.jsonl", ROWS)
    return folder


@pytest.fixture(scope="module")
def data_set(folder, checkpoint):
    from k3jax.cli.main import main

    words = ["synthesize", folder / "rows.jsonl", folder / "out", "--checkpoint", checkpoint]
    assert main([str(word) for word in [*words, *SETTINGS, "--format", "parquet"]]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def stored(data_set):
    rows = {r["id"]: r for r in pq.read_table(data_set / "metadata").to_pylist()}
    for row in pq.read_table(data_set / "data").to_pylist():
        rows[row["id"]]["pixels"] = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
        rows[row["id"]]["record"] = row
    return rows


def test_rows(stored):
    assert [row["status"] for row in stored.values()] == [
        *("ok", "ok", "ok", "failed", "ok", "failed", "failed")
    ]
    assert stored["gone"]["reason"].endswith("in/none.png does not exist")
    assert stored["broken"]["reason"].endswith("in/broken.png is not an image that can be read")
    assert stored["other"]["reason"] == "the mask is 64x64 and the image 200x100"
    row = stored["masked"]
    assert (row["image"], row["mask"], row["strength"]) == ("in/square.png", "in/mask.png", 1.0)
    assert len(row["image_sha256"]) == len(row["mask_sha256"]) == 64
    assert stored["text"]["image"] is None and stored["text"]["record"]["input_image"] == ""
    assert stored["masked"]["record"]["input_mask"] == "in/mask.png"


def test_the_pipelines_make_the_same(stored, checkpoint, folder):
    pipe = Kandinsky3Pipeline.from_pretrained(checkpoint, dtype="float32")

    def same(name, made, tolerance=0):
        difference = np.asarray(made.images[0]).astype(int) - stored[name]["pixels"]
        assert np.abs(difference).max() <= tolerance

    def settings(name):
        row = stored[name]
        return {"seed": row["seed"], "num_inference_steps": 4, "progress_bar": False}

    same("text", pipe("no image at all", height=64, width=64, **settings("text")))
    change = Kandinsky3Img2ImgPipeline.from_pipe(pipe)
    square = folder / "in" / "square.png"
    same("changed", change("a red circle", square, 0.5, **settings("changed")))
    middle = Image.open(folder / "in" / "wide.jpg").crop((50, 0, 150, 100))
    middle = middle.resize((64, 64), Image.Resampling.BICUBIC)
    same("wide", change("a red circle", middle, 0.5, **settings("wide")))
    paint = Kandinsky3InpaintPipeline.from_pipe(pipe)
    mask = folder / "in" / "mask.png"
    # The seam is blended before the pixels are rounded; for PIL images, afterwards.
    same("masked", paint("a cat", square, mask, **settings("masked")), 1)
    (made,) = paint("a cat", square, mask, output_type="np", **settings("masked")).images
    np.testing.assert_array_equal(np.round(made * 255), stored["masked"]["pixels"])


def test_regenerate_and_repair(data_set, folder, stored, made, refuses, tmp_path):
    lines, err = made("regenerate", data_set, "masked", "wide", "-o", tmp_path / "again")
    assert len(lines) == 2 and all("the same bytes" in line for line in err)
    made("verify", data_set)
    sidecar = (data_set / "metadata" / "000000.parquet").read_bytes()
    data = next((data_set / "data").iterdir())
    content = data.read_bytes()
    data.unlink()
    made("verify", data_set, "--repair")
    assert data.read_bytes() == content
    assert (data_set / "metadata" / "000000.parquet").read_bytes() == sidecar

    square = folder / "in" / "square.png"
    before = square.read_bytes()
    try:
        Image.new("RGB", (64, 64)).save(square)
        message = refuses("regenerate", data_set, "changed", "-o", tmp_path / "other")
        assert "is not the one that was used (its sha256 differs)" in message
    finally:
        square.write_bytes(before)


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"mask": "m.png"}, "has a mask but no image"),
        ({"strength": 0.5}, "has a strength but no image"),
        ({"image": "i.png", "strength": 2}, "has an image whose strength is 2.0; it must be betwe"),
        ({"image": "i.png", "strength": 0.1}, "has an image whose strength 0.1 leaves none of 4"),
        (
            {"image": "i.png", "mask": "m.png", "strength": 0},
            "has an image whose strength is 0, which rep",
        ),
        ({"image": {"bytes": "x"}}, "has the image {'bytes': 'x'}; it must be a string"),
    ],
)
def test_bad_rows(tmp_path, refuses, stubs, row, reason):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a", **row}])
    assert f"line 1: {reason}" in refuses("synthesize", path, tmp_path / "out", *SETTINGS)


def test_images_elsewhere(folder, tmp_path):
    """Absolute paths, and folders or addresses that relative ones start from."""
    import fsspec

    square = folder / "in" / "square.png"
    fsspec.filesystem("memory").pipe_file("/pictures/square.png", square.read_bytes())
    found = []
    for image, base in (
        (str(square), "/nowhere"),
        ("in/square.png", str(folder)),
        ("square.png", "memory://pictures"),
        ("memory://pictures/square.png", "."),
    ):
        sample = Sample(0, "a", 1, "a", width=32, height=64, image=image, strength=1.0)
        found.append(read_inputs(sample, base))
    assert all((inputs.image == found[0].image).all() for inputs in found)
    assert found[0].image.shape == (64, 32, 3)
