# SPDX-License-Identifier: Apache-2.0
"""Every form in which people have images, good and bad."""

import io

import numpy as np
import pytest
from PIL import Image

from k3jax.images.masks import read_mask, read_masks
from k3jax.images.reading import read_image, read_images


ROWS, COLUMNS = np.mgrid[:24, :40]
IMAGE = np.stack([6 * COLUMNS, 10 * ROWS, 4 * (ROWS + COLUMNS)], axis=-1).astype(np.uint8)
PIL = Image.fromarray(IMAGE)
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


def saved(image: Image.Image, **kwargs) -> Image.Image:
    """Through a file in memory."""
    file = io.BytesIO()
    image.save(file, **kwargs)
    file.seek(0)
    return Image.open(file)


def test_arrays_and_modes():
    grey = np.asarray(PIL.convert("L"))
    for form in (PIL, IMAGE, IMAGE.astype(np.int64), IMAGE.astype(np.float32) / 255):
        assert np.array_equal(read_image(form), IMAGE)
    for form in (grey, grey[..., None], Image.fromarray(grey), grey.astype(np.float64) / 255):
        assert np.array_equal(read_image(form), np.repeat(grey[..., None], 3, axis=2))
    palette = PIL.convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(read_image(palette), np.asarray(palette.convert("RGB")))
    cmyk = PIL.convert("CMYK")
    assert np.array_equal(read_image(cmyk), np.asarray(cmyk.convert("RGB")))
    assert np.array_equal(read_image(grey > 100)[..., 0], (grey > 100) * np.uint8(255))


def test_transparency_lies_over_white():
    alpha = np.zeros((24, 40), np.uint8)
    alpha[:, 20:] = 255
    alpha[:, 10:20] = 51  # a fifth
    rgba = np.dstack([IMAGE, alpha])
    for form in (rgba, Image.fromarray(rgba)):
        got = read_image(form).astype(int)
        assert np.array_equal(got[:, 20:], IMAGE[:, 20:])
        assert (got[:, :10] == 255).all()
        assert np.abs(got[:, 10:20] - (IMAGE[:, 10:20] * 0.2 + 204)).max() <= 1
    palette = Image.new("P", (4, 4))
    palette.putpalette([0, 0, 0, 200, 10, 10])
    assert (read_image(saved(palette, format="PNG", transparency=0)) == 255).all()


def test_16_bits():
    grey = np.linspace(0, 65535, 24 * 40).reshape(24, 40).astype(np.uint16)
    expected = np.rint(grey / 257).astype(np.uint8)
    for form in (grey, Image.fromarray(grey), saved(Image.fromarray(grey), format="PNG")):
        assert np.array_equal(read_image(form)[..., 0], expected)
    deep = Image.fromarray(grey.astype(np.int32))
    assert deep.mode == "I" and np.array_equal(read_image(deep)[..., 0], expected)
    floats = Image.fromarray((grey / 65535).astype(np.float32))
    assert np.array_equal(read_image(floats)[..., 0], expected)


def test_what_a_camera_noted_of_its_orientation():
    for orientation, turned in (
        (3, IMAGE[::-1, ::-1]),
        (6, np.rot90(IMAGE, -1)),
        (8, np.rot90(IMAGE)),
    ):
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert np.array_equal(read_image(saved(PIL, format="PNG", exif=exif)), turned)
    mask = Image.new("L", (40, 24))
    mask.paste(255, (0, 0, 10, 24))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_mask(saved(mask, format="PNG", exif=exif))[:10].all()


def test_lists_and_batches(tmp_path):
    PIL.save(tmp_path / "a.png")
    mixed = read_images([tmp_path / "a.png", PIL, IMAGE])
    assert len(mixed) == 3 and all(np.array_equal(image, IMAGE) for image in mixed)
    assert len(read_images(np.stack([IMAGE] * 2))) == 2 and len(read_images(PIL)) == 1
    mask = IMAGE[..., 0] > 100
    assert len(read_masks(mask)) == len(read_masks(mask[..., None])) == 1
    assert len(read_masks(np.stack([mask] * 4))) == 4


def test_bytes_and_open_files(tmp_path):
    PIL.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    half_read = io.BytesIO(content)
    half_read.read(9)
    with open(tmp_path / "a.png", "rb") as file:
        for form in (content, bytearray(content), half_read, file, str(tmp_path / "a.png")):
            assert np.array_equal(read_image(form), IMAGE)


class Tensor:
    """What k3jax knows of a tensor of PyTorch that has a gradient, on a GPU, in bfloat16."""

    dtype = "torch.bfloat16"

    def __init__(self, array, ready=""):
        self.array, self.ready = array, ready

    def detach(self):
        return Tensor(self.array, "detached")

    def cpu(self):
        return Tensor(self.array, self.ready and f"{self.ready} on CPU")

    def float(self):
        return Tensor(self.array, f"{self.ready} float")

    resolve_conj = resolve_neg = lambda self: self

    def __array__(self, dtype=None, copy=None):
        assert self.ready == "detached on CPU float"
        return self.array


def test_channels_first():
    """As tensors of PyTorch have them; what could be both is read as numpy has it."""
    first = np.ascontiguousarray(np.moveaxis(IMAGE, -1, 0))
    for form in (first, first / np.float64(255), Tensor(first / np.float32(255))):
        assert np.array_equal(read_image(form), IMAGE)
    batch = read_images(Tensor(np.stack([first, first]) / np.float32(255)))
    assert len(batch) == 2 and np.array_equal(batch[1], IMAGE)
    assert np.array_equal(read_image(IMAGE[:3, :, :]), IMAGE[:3])  # (3, 40, 3)
    mask = IMAGE[..., 0] > 100
    for form in (mask[None], mask[None, None], Tensor(mask[None, None])):
        (read,) = read_masks(form)
        assert np.array_equal(read, mask)


def test_a_mask_that_was_a_jpeg():
    """Its compression must not make the whole image a little bit to be repainted."""
    mask = np.zeros((64, 64), np.uint8)
    mask[11:29, 11:29] = 255
    jpeg = saved(Image.fromarray(mask), format="JPEG", quality=90)
    assert len(np.unique(np.asarray(jpeg))) > 2
    read = read_mask(jpeg)
    assert (read[14:26, 14:26] == 1).all() and (read[40:, 40:] == 0).all()
    soft = np.linspace(0, 1, 11, dtype=np.float32)[None]
    assert np.array_equal(read_mask(soft), soft)


@pytest.mark.parametrize(
    "image, message",
    [
        (None, "image must be a path, bytes, a PIL image or an array, not NoneType"),
        (object(), "image must be a path, bytes, a PIL image or an array, not object"),
        ("https://x.org/a.png", "image is an address .*: download it, and give the path or the by"),
        (b"hello", "image is not an image in a format that can be read"),
        (io.StringIO("a"), r'image is a file of text: open it with open\(path, "rb"\)'),
        (HEIC, r"image is HEIC, .* pip install pillow-heif"),
        (np.zeros((5, 4, 2)), r"image has shape \(5, 4, 2\); an image is \(height, width, chann"),
        (np.zeros((2, 40, 24), np.uint8), r"image has shape \(2, 40, 24\)"),
        (np.zeros((0, 4, 3)), r"array \(0, 4, 3\) of float64, which is no image"),
        (np.full((4, 4, 3), -1.0), "image has floats from -1 to -1; they must be in 0 to 1"),
        (np.full((4, 4, 3), 300), "image has values from 300 to 300; they must be in 0 to 255"),
        (np.full((4, 4, 3), np.inf), "image has values that are not finite"),
        (np.array([["a"]]), "which is no image"),
    ],
)
def test_what_is_no_image(image, message):
    with pytest.raises(ValueError, match=message):
        read_image(image)


def test_files_that_are_no_images(tmp_path):
    PIL.save(tmp_path / "good.png")
    content = (tmp_path / "good.png").read_bytes()
    (tmp_path / "short.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match=r"image: \S+/short.png cannot be read as an image \("):
        read_image(tmp_path / "short.png")
    for name in ("text.png", "empty.png"):
        with pytest.raises(ValueError, match=f"{name} is not an image in a format that can be"):
            read_image(tmp_path / name)
    with pytest.raises(ValueError, match="there is no file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match="there is no file"):
        read_image(tmp_path)
    with pytest.raises(ValueError, match="image is an empty list"):
        read_images([])


def test_an_image_that_is_a_bomb(tmp_path, monkeypatch):
    PIL.save(tmp_path / "good.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"good.png has too many pixels .*bomb; the limit is 200"):
        read_image(tmp_path / "good.png")


def test_a_mask_of_another_shape():
    with pytest.raises(ValueError, match=r"mask_image has shape \(8, 8, 2\); a mask is \(height"):
        read_mask(np.zeros((8, 8, 2)))


MASK = np.zeros((96, 128), bool)
MASK[8:60, 10:70] = True
MASK[70:90, 90:96] = True


def painted(color, background=(0, 0, 0)) -> np.ndarray:
    """MASK in a colour."""
    return np.where(MASK[..., None], np.uint8(color), np.uint8(background))


@pytest.mark.parametrize(
    "color", [(255, 0, 0), (0, 0, 255), (255, 255, 0), (128, 0, 0), (20, 200, 90), (12, 0, 1)]
)
def test_a_mask_in_one_colour_counts_as_white(tmp_path, color):
    rgb = painted(color)
    image = Image.fromarray(rgb)
    image.save(tmp_path / "mask.png")
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    opaque = np.dstack([rgb, np.full(MASK.shape, 255, np.uint8)])
    forms = [image, rgb, rgb / 255, tmp_path / "mask.png", saved(palette, format="PNG")]
    forms += [opaque, Image.fromarray(opaque), saved(palette, format="GIF"), image.convert("HSV")]
    for form in forms:
        assert np.array_equal(read_mask(form), MASK)
    assert [np.array_equal(mask, MASK) for mask in read_masks(opaque)] == [True]


@pytest.mark.parametrize("color", ["red", "lime", "blue", "yellow", "maroon"])
def test_a_mask_in_one_colour_that_was_a_jpeg(color):
    """Beside its edges, colours that were not painted: no fault, and no ghost far from them."""
    image = Image.composite(
        Image.new("RGB", MASK.shape[::-1], color),
        Image.new("RGB", MASK.shape[::-1]),
        Image.fromarray(MASK),
    )
    read = read_mask(saved(image, format="JPEG", quality=75))
    assert (read[14:54, 16:64] == 1).all() and (read[:, 104:] == 0).all()
    assert np.abs(read - MASK).mean() < 0.04


def test_shades_of_a_colour_are_shares():
    edge = np.linspace(0, 1, 52)
    soft = np.zeros((20, 52, 3), np.uint8)
    soft[..., 0] = np.rint(200 * np.minimum(1, 2 * edge))
    expected = np.minimum(1, 2 * edge)
    read = read_mask(soft)
    inside = (expected > 0.07) & (expected < 0.93)
    np.testing.assert_allclose(read[:, inside], np.tile(expected[inside], (20, 1)), atol=0.01)
    assert (read[:, :2] == 0).all() and (read[:, 26:] == 1).all()


def test_palettes_of_labels_and_of_greys():
    """0 and 1 in a palette are what their colours are."""
    labels = Image.fromarray(MASK.astype(np.uint8))
    for colors in ([0, 0, 0, 128, 0, 0], [0, 0, 0, 255, 255, 255], [0, 0, 0, 1, 1, 1]):
        labels.putpalette(colors)
        assert labels.mode == "P" and np.array_equal(read_mask(labels), MASK)
    labels.putpalette([255, 255, 255, 0, 0, 0])
    assert np.array_equal(read_mask(labels), ~MASK)


@pytest.mark.parametrize(
    "mask",
    [
        painted((255, 0, 0), (255, 255, 255)),
        painted((255, 0, 0), (0, 0, 255)),
        painted((255, 255, 255), (0, 128, 0)),
        np.where(np.arange(128)[None, :, None] < 80, painted((255, 0, 0)), painted((0, 255, 0))),
        np.where(
            np.arange(128)[None, :, None] < 80, painted((255, 255, 255)), painted((255, 0, 0))
        ),
    ],
)
def test_a_mask_in_several_colours(tmp_path, mask):
    Image.fromarray(mask).save(tmp_path / "mask.png")
    for form in (mask, tmp_path / "mask.png"):
        with pytest.raises(ValueError, match="has several colours: give a mask in black"):
            read_mask(form)


def test_a_mask_that_is_transparent():
    mask = np.zeros((8, 8, 4), np.uint8)
    alpha = Image.fromarray(np.uint8(MASK * 255))
    white = Image.new("L", alpha.size, 255)
    palette = Image.fromarray(MASK.astype(np.uint8))
    palette.putpalette([0, 0, 0, 255, 255, 255])
    for form in (
        mask,
        Image.fromarray(mask),
        Image.merge("LA", (white, alpha)),
        saved(palette, format="PNG", transparency=0),
    ):
        with pytest.raises(ValueError, match="mask_image is transparent in places, which can mean"):
            read_mask(form)


def test_floats_of_a_file_that_are_not_finite(tmp_path):
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    for read in (read_image, read_mask):
        with pytest.raises(ValueError, match="has values that are not finite"):
            read(tmp_path / "nan.tiff")


def test_an_image_that_pillow_opened_and_cannot_decode(tmp_path):
    PIL.save(tmp_path / "good.png")
    content = (tmp_path / "good.png").read_bytes()
    (tmp_path / "short.png").write_bytes(content[: len(content) // 2])
    with Image.open(tmp_path / "short.png") as image:
        with pytest.raises(ValueError, match=r"image \(\S+/short.png\) cannot be read as an image"):
            read_image(image)


def test_programs_are_not_run(tmp_path):
    PIL.save(tmp_path / "a.eps")
    with pytest.raises(ValueError, match=r"a.eps cannot be read .*PostScript is a program"):
        read_image(tmp_path / "a.eps")
