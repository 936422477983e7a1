# SPDX-License-Identifier: Apache-2.0
"""Rows that start from images, with the small model: as the pipelines make them, and audited."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from k3jax import Kandinsky3Pipeline
from k3jax.pipelines.image_to_image import Kandinsky3Img2ImgPipeline
from k3jax.pipelines.inpaint import Kandinsky3InpaintPipeline
from k3jax.synthesis.input_images import read_inputs
from k3jax.synthesis.samples import Sample

from damaged_images import encoded, exif_block, png_chunk
from data_sets import write_jsonl


SETTINGS = [
    *("--size", "64x64", "--dtype", "float32", "--image-format", "png", "--steps", "4"),
    *("--batch-size", "4"),
]
ROWS = [
    {"id": "changed", "prompt": "a red circle", "image": "in/square.png", "strength": 0.5},
    {"id": "wide", "prompt": "a red circle", "image": "in/wide.jpg", "strength": 0.5},
    {"id": "masked", "prompt": "a cat", "image": "in/square.png", "mask": "in/mask.png"},
    {"id": "gone", "prompt": "a cat", "image": "in/none.png", "strength": 0.5},
    {"id": "text", "prompt": "no image at all"},
    {"id": "broken", "prompt": "a cat", "image": "in/broken.png", "strength": 0.5},
    {"id": "other", "prompt": "a cat", "image": "in/wide.jpg", "mask": "in/mask.png"},
    {"id": "turned", "prompt": "a red circle", "image": "in/turned.jpg", "strength": 0.5},
    {"id": "junk", "prompt": "a red circle", "image": "in/junk.png", "strength": 0.5},
    {"id": "avif", "prompt": "a cat", "image": "in/broken.avif", "strength": 0.5},
    {"id": "dds", "prompt": "a cat", "image": "in/broken.dds", "strength": 0.5},
    {"id": "bomb", "prompt": "a cat", "image": "in/bomb.png", "strength": 0.5},
    {"id": "red", "prompt": "a cat", "image": "in/square.png", "mask": "in/red.png"},
    {"id": "colours", "prompt": "a cat", "image": "in/square.png", "mask": "in/square.png"},
    {"id": "folder", "prompt": "a cat", "image": "in", "strength": 0.5},
]


pytestmark = pytest.mark.usefixtures("one_device_here")


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
    turned = exif_block([(0x0112, "H", 6), (0x011A, "s", b"abc\0")])
    picture(100, 200).save(folder / "in" / "turned.jpg", exif=turned)
    picture(64, 64).save(folder / "in" / "junk.png", exif=b"junk")
    Image.fromarray(np.dstack([mask, 0 * mask, 0 * mask])).save(folder / "in" / "red.png")
    avif = encoded(picture(64, 64), "AVIF")
    (folder / "in" / "broken.avif").write_bytes(avif[:-200] + bytes(200))
    dds = bytearray(encoded(picture(64, 64), "DDS"))
    dds[80:84] = bytes(4)  # flags of the pixel format
    (folder / "in" / "broken.dds").write_bytes(dds)
    header = b"".join(n.to_bytes(4) for n in (50_000, 50_000)) + b"\x08\2\0\0\0"
    bomb = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"")
    (folder / "in" / "bomb.png").write_bytes(bomb)
    write_jsonl(folder / "rows.jsonl", ROWS)
    return folder


@pytest.fixture(scope="module")
def data_set(folder, checkpoint, one_device_here):
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
    good = ("changed", "wide", "masked", "text", "turned", "junk", "red")
    assert {row["id"]: row["status"] for row in stored.values()} == {
        row["id"]: "ok" if row["id"] in good else "failed" for row in ROWS
    }
    assert stored["gone"]["reason"].endswith("in/none.png does not exist")
    for name, reason in {
        "broken": "in/broken.png is not an image in a format that can be read",
        "avif": "in/broken.avif cannot be read as an image (",
        "dds": "in/broken.dds cannot be read as an image (Unknown pixel format flags 0)",
        "bomb": "in/bomb.png has too many pixels",
        "colours": "in/square.png has several colours",
        "folder": "in cannot be read: Is a directory",
    }.items():
        assert reason in stored[name]["reason"], stored[name]["reason"]
    assert stored["other"]["reason"] == "the mask is 64x64 and the image 200x100"
    row = stored["masked"]
    assert (row["image"], row["mask"], row["strength"]) == ("in/square.png", "in/mask.png", 1.0)
    assert len(row["image_sha256"]) == len(row["mask_sha256"]) == 64
    assert stored["text"]["image"] is None and stored["text"]["record"]["input_image"] == ""
    assert stored["masked"]["record"]["input_mask"] == "in/mask.png"


def test_the_pipelines_make_the_same(stored, checkpoint, folder):
    pipe = Kandinsky3Pipeline.from_pretrained(checkpoint, dtype="float32", batch_size=4)

    def same(name, made):
        np.testing.assert_array_equal(np.round(made.images[0] * 255), stored[name]["pixels"])

    def settings(name):
        row = stored[name]
        # As data sets do: "pil" is another program.
        shared = {"num_inference_steps": 4, "progress_bar": False, "output_type": "np"}
        return {"seed": row["seed"], **shared}

    same("text", pipe("no image at all", height=64, width=64, **settings("text")))
    change = Kandinsky3Img2ImgPipeline.from_pipe(pipe)
    square = folder / "in" / "square.png"
    same("changed", change("a red circle", square, 0.5, **settings("changed")))
    middle = Image.open(folder / "in" / "wide.jpg").crop((50, 0, 150, 100))
    middle = middle.resize((64, 64), Image.Resampling.BICUBIC)
    same("wide", change("a red circle", middle, 0.5, **settings("wide")))
    upright = np.rot90(np.asarray(Image.open(folder / "in" / "turned.jpg")), -1)
    middle = Image.fromarray(upright).crop((50, 0, 150, 100))
    middle = middle.resize((64, 64), Image.Resampling.BICUBIC)
    same("turned", change("a red circle", middle, 0.5, **settings("turned")))
    pixels = np.asarray(Image.open(folder / "in" / "junk.png"))
    same("junk", change("a red circle", pixels, 0.5, **settings("junk")))
    paint = Kandinsky3InpaintPipeline.from_pipe(pipe)
    mask = folder / "in" / "mask.png"
    same("masked", paint("a cat", square, mask, **settings("masked")))
    same("red", paint("a cat", square, mask, **settings("red")))


def test_regenerate_repair_and_restart(
    data_set, folder, stored, made, refuses, checkpoint, tmp_path
):
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
    words = ["synthesize", folder / "rows.jsonl", data_set, "--checkpoint", checkpoint]
    made(*words, *SETTINGS, "--format", "parquet")  # nothing is left to do
    data.unlink()
    (data_set / "metadata" / "000000.parquet").unlink()
    made(*words, *SETTINGS, "--format", "parquet")
    assert data.read_bytes() == content

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
