# SPDX-License-Identifier: Apache-2.0
"""`k3jax img2img`, `inpaint` and `outpaint`."""

import numpy as np
import pytest
from PIL import Image

from k3jax import Kandinsky3Img2ImgPipeline, Kandinsky3InpaintPipeline, extend_canvas
from k3jax.checkpoints.format import read_checkpoint
from k3jax.cli.inputs import NOTE
from k3jax.images.pngs import read_settings

from damaged_images import PICTURE, encoded


SMALL = ["--steps", "2", "--dtype", "float32", "--mesh", "data=1"]
BLEND = [
    "k3jax: note: this checkpoint was not trained to inpaint: the known part is blended in at "
    "every step (method blend)."
]

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two images of different sizes and a mask of the first."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, shape in (("a", (64, 64, 3)), ("b", (70, 70, 3))):
        noise = rng.integers(0, 256, (4, 4, 3), np.uint8)
        image = Image.fromarray(noise).resize(shape[1::-1], Image.Resampling.BICUBIC)
        image.save(folder / f"{name}.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 24:60] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_img2img(run, files, tmp_path):
    out = tmp_path / "out"
    code, paths, err = run(
        *("img2img", "a red circle", "--image", files / "a.png", "--image", files / "b.png"),
        *("--strength", "0.5", "-n", "2", "--seed", "7", "--negative-prompt", "bad"),
        *("--max-area", "4096", "-o", out, *SMALL),
    )
    assert code == 0 and err == [NOTE]
    names = [f"{k:04d}_seed{7 + k}_a-red-circle.png" for k in range(4)]
    assert paths == [str(out / name) for name in [*names, "contact_sheet.png"]]
    assert [pixels(path).shape[:2] for path in paths[:4]] == [(64, 64)] * 2 + [(70, 70)] * 2
    # A sheet of 4 pairs, two columns of before and after.
    width, height = Image.open(paths[-1]).size
    assert width > 2 * 64 and height > 64

    settings = read_settings(paths[3])
    assert settings["task"] == "img2img" and settings["call"]["strength"] == 0.5
    pipe = Kandinsky3Img2ImgPipeline.from_pretrained("tiny", mesh="data=1", dtype="float32")
    (again,) = pipe(**settings["call"], progress_bar=False).images
    assert np.array_equal(np.asarray(again), pixels(paths[3]))


def test_inpaint(run, files, tmp_path):
    out = tmp_path / "one.png"
    args = ["inpaint", "a red star", "--image", files / "a.png", "--mask", files / "mask.png"]
    code, paths, err = run(*args, "--feather", "2", "--checkpoint", "tiny", "-o", out, *SMALL)
    assert code == 0 and err == BLEND
    assert paths == [str(out), str(tmp_path / "contact_sheet.png")]
    image, made, mask = pixels(files / "a.png"), pixels(out), pixels(files / "mask.png")[..., 0]
    assert (made[mask > 0] != image[mask > 0]).any()
    assert np.array_equal(made[:12], image[:12]) and np.array_equal(made[:, :20], image[:, :20])
    settings = read_settings(out)
    assert (settings["task"], settings["method"]) == ("inpaint", "blend")
    pipe = Kandinsky3InpaintPipeline.from_pretrained("tiny", mesh="data=1", dtype="float32")
    (again,) = pipe(**settings["call"], progress_bar=False).images
    assert np.array_equal(np.asarray(again), made)
    sheet = pixels(paths[1])
    assert sheet.shape[1] > 2 * 64


def test_outpaint_extends_the_canvas(run, planned, files, tmp_path):
    """Without a checkpoint, with the packaged inpainting model."""
    args = ["outpaint", "a red star", "--image", files / "a.png", "--right", "64"]
    code, paths, _ = run(*args, "-o", tmp_path / "out", *SMALL)
    assert code == 0 and paths == [str(tmp_path / "out" / "contact_sheet.png")]
    ((image_run, images, arrays, names, settings),) = planned
    assert image_run.checkpoint.fingerprint == read_checkpoint("tiny-inpainting").fingerprint
    assert [image.path.parent for image in images] == [tmp_path / "out"]
    (canvas,), (mask,) = arrays["image"], arrays["mask_image"]
    assert canvas.shape == (64, 128, 3) and image_run.inputs.sizes == [(128, 64)]
    assert not mask[:, :64].any() and mask[:, 64:].all()
    assert names == {"image": [str(files / "a.png")]}
    assert settings["extend_canvas"]["right"] == 64 and settings["method"] == "model"


@pytest.mark.slow
def test_outpaint(run, demo, files, tmp_path):
    args = ["outpaint", "a red star", "--image", files / "a.png", "--right", "64", "--feather", "4"]
    code, paths, err = run(*args, "--checkpoint", demo, "-o", tmp_path / "out", *SMALL)
    assert code == 0 and err == BLEND
    image, made = pixels(files / "a.png"), pixels(paths[0])
    assert made.shape == (64, 128, 3)
    assert np.array_equal(made[:, :60], image[:, :60])
    canvas, _ = extend_canvas(image, right=64)
    assert (made[:, 64:] != np.asarray(canvas)[:, 64:]).any()
    assert read_settings(paths[0])["extend_canvas"]["right"] == 64


@pytest.mark.slow
def test_inpaint_by_the_small_model(run, files, tmp_path):
    args = ["inpaint", "a red star", "--image", files / "a.png", "--mask", files / "mask.png"]
    code, paths, err = run(*args, "-o", tmp_path / "one.png", *SMALL)
    assert code == 0 and err == [NOTE]
    settings = read_settings(paths[0])
    assert settings["method"] == "model"
    assert settings["checkpoint"]["fingerprint"] == read_checkpoint("tiny-inpainting").fingerprint


@pytest.mark.parametrize(
    "args, message",
    [
        (["img2img", "a"], "give at least one image with --image FILE"),
        (["img2img", "--image", "{files}/a.png"], "give at least one prompt"),
        (["img2img", "a", "--image", "{files}/none.png"], "there is no file {files}/none.png"),
        (["img2img", "a", "--image", "{tmp}/bad.png"], "bad.png is not an image in a format that"),
        (["img2img", "a", "--image", "{tmp}/bad.dds"], "bad.dds cannot be read as an image (Unkn"),
        (
            ["inpaint", "a", "--image", "{files}/a.png", "--mask", "{files}/a.png"],
            "a.png has several colours: give a mask in black",
        ),
        (["img2img", "a", "--image", "{files}/a.png", "--strength", "2"], "strength is 2.0"),
        (
            ["img2img", "a", "--image", "{files}/a.png", "--strength", "0.01", "--steps", "10"],
            "strength 0.01 leaves none of 10 steps: give at least 0.1",
        ),
        (
            ["img2img", "a", "b", "c", "--image", "{files}/a.png", "--image", "{files}/b.png"],
            "there are 3 prompts and 2 images: give one for all, or one for each",
        ),
        (["img2img", "a", "--image", "{files}/a.png", "--max-area", "9"], "max_area is 9"),
        (["img2img", "a", "--image", "{files}/a.png", "--seed", "-1"], "seed -1 is not between"),
        (["img2img", "a", "--image", "{files}/a.png", "--lora-scale", "2"], "--lora-scale is the"),
        (["img2img", "a", "--image", "{files}/a.png", "--mask", "x"], "has no argument '--mask'"),
        (["inpaint", "a", "--image", "{files}/a.png"], "give at least one mask with --mask FILE"),
        (
            ["inpaint", "a", "--image", "{files}/b.png", "--mask", "{files}/mask.png"],
            "mask_image is 64 x 64 pixels and its image 70 x 70: they must be of one size",
        ),
        (["outpaint", "a", "--image", "{files}/a.png"], "give the pixels to add on at least one"),
        (["outpaint", "a", "--image", "{files}/a.png", "--left", "-3"], "left is -3; it must be"),
    ],
)
def test_refuses(refuses, demo, files, tmp_path, args, message):
    (tmp_path / "bad.png").write_text("no image")
    dds = bytearray(encoded(PICTURE, "DDS"))
    dds[80:84] = bytes(4)  # flags of the pixel format
    (tmp_path / "bad.dds").write_bytes(dds)
    args = [arg.format(files=files, tmp=tmp_path) for arg in args]
    args += ["--checkpoint", str(demo), "-o", str(tmp_path / "out")]
    assert message.format(files=files, tmp=tmp_path) in refuses(*args)
    assert not (tmp_path / "out").exists()
