# SPDX-License-Identifier: Apache-2.0
"""Buckets, and image files of every kind."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from k3jax.training.data.buckets import (
    assign,
    bucket_index,
    decode,
    fit,
    make_buckets,
    read_image,
    read_size,
    scale,
)
from k3jax.training.data.image_folder import FolderSource
from k3jax.training.train_config import DataConfig

import damaged_images
from data_sources import encoded, picture


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(decode(data, "x"))


@pytest.mark.parametrize("resolution", [64, 256, 512, 768, 1024])
def test_buckets_have_the_area_and_the_ratios(resolution):
    buckets = make_buckets(resolution)
    assert (resolution, resolution) in buckets
    assert sorted((w, h) for h, w in buckets) == sorted(buckets)  # landscape as portrait
    for h, w in buckets:
        assert h % 64 == w % 64 == 0
        assert h * w <= resolution**2
        assert 0.5 <= h / w <= 2
        grown = [(h + 64, w), (h, w + 64)]
        assert all(a * b > resolution**2 or max(a, b) > 2 * min(a, b) for a, b in grown)


def test_the_buckets_of_a_megapixel():
    wide = [(h, w) for h, w in make_buckets(1024) if w >= h]
    assert wide == [(1024, 1024), (960, 1088), (896, 1152), (832, 1216), (768, 1344), (704, 1408)]
    assert (640, 1600) in make_buckets(1024, max_ratio=2.5)
    assert make_buckets(32, multiple=8) == [
        (40, 24),
        (32, 32),
        (24, 40),
    ]


def test_the_nearest_ratio_is_assigned():
    buckets = make_buckets(1024)
    ratios = np.log([w / h for h, w in buckets])
    widths, heights = np.random.default_rng(0).integers(1, 4000, (2, 1000))
    expected = np.abs(np.log(widths / heights)[:, None] - ratios).argmin(1)
    np.testing.assert_array_equal(assign(widths, heights, buckets), expected)
    assert buckets[assign(3000, 1000, buckets)] == (704, 1408)
    for number, (h, w) in enumerate(buckets):
        assert assign(w, h, buckets) == number
        assert scale(2 * w, 2 * h, (h, w)) == 0.5
    shuffled = buckets[::-1]  # in any order
    assert shuffled[assign(700, 900, shuffled)] == buckets[assign(700, 900, buckets)]


def test_an_image_covers_its_bucket_and_is_cut_in_the_middle():
    strips = np.zeros((64, 256, 3), np.uint8)
    strips[:, 96:160] = 255
    np.testing.assert_array_equal(fit(Image.fromarray(strips), (64, 64)), 255)
    turned = Image.fromarray(strips.swapaxes(0, 1))
    np.testing.assert_array_equal(fit(turned, (64, 64)), 255)
    exact = picture(0, 64, 128)
    np.testing.assert_array_equal(fit(Image.fromarray(exact), (64, 128)), exact)
    for h, w in itertools.product((63, 64, 65, 1000, 1001), (63, 127, 999)):
        assert fit(Image.new("RGB", (w, h)), (64, 128)).shape == (64, 128, 3)


def test_shrinking_does_not_alias():
    checks = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    image = Image.fromarray(np.stack([checks] * 3, -1))
    assert np.abs(fit(image, (64, 64)).astype(int) - 127.5).max() < 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(kind, orientation):
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :16] = 255  # white at the top left
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {} if kind in ("PNG", "TIFF") else {"quality": 100}
    data = saved(Image.fromarray(stored), kind, exif=exif, **options)
    seen = pixels(data)
    corner = {
        1: (0, 0),
        2: (0, 1),
        3: (1, 1),
        4: (1, 0),
        5: (0, 0),
        6: (0, 1),
        7: (1, 1),
        8: (1, 0),
    }
    y, x = corner[orientation]
    h, w = seen.shape[:2]
    assert read_size(io.BytesIO(data), "x") == (w, h) == ((32, 16) if orientation < 5 else (16, 32))
    assert seen[h // 4 + y * h // 2, w // 4 + x * w // 2].min() > 200
    assert seen[h // 4 + (1 - y) * h // 2, w // 4 + x * w // 2].max() < 50


def test_transparency_is_put_on_white():
    rgba = np.full((2, 3, 4), (200, 100, 0, 0), np.uint8)
    rgba[0, 1, 3], rgba[1, 2, 3] = 255, 51
    seen = pixels(saved(Image.fromarray(rgba)))
    assert seen[0, 0].tolist() == [255, 255, 255]
    assert seen[0, 1].tolist() == [200, 100, 0]
    assert seen[1, 2].tolist() == [244, 224, 204]
    grey = pixels(saved(Image.fromarray(np.uint8([[[10, 0], [10, 255]]]), "LA")))
    assert grey[0].tolist() == [[255] * 3, [10] * 3]


def test_palettes_are_looked_up_and_their_transparent_colour_is_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert pixels(saved(image))[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    assert pixels(saved(image, transparency=1))[0].tolist() == [[10, 20, 30], [255] * 3]
    assert pixels(saved(image, "GIF", transparency=0))[0].tolist() == [[255] * 3, [40, 50, 60]]
    keyed = Image.fromarray(np.uint8([[[1, 2, 3], [9, 9, 9]]]))
    assert pixels(saved(keyed, transparency=(1, 2, 3)))[0].tolist() == [[255] * 3, [9] * 3]


def test_sixteen_bits_are_rounded_to_eight():
    deep = np.uint16([[0, 128, 257, 40000, 65535]])
    expected = [[v] * 3 for v in (0, 0, 1, 156, 255)]
    assert pixels(saved(Image.fromarray(deep)))[0].tolist() == expected
    assert pixels(saved(Image.fromarray(deep), "TIFF"))[0].tolist() == expected
    assert pixels(saved(Image.fromarray(deep.astype(">u2")), "TIFF"))[0].tolist() == expected


def test_other_modes():
    assert pixels(saved(Image.new("L", (2, 2), 77)))[0, 0].tolist() == [77] * 3
    assert pixels(saved(Image.new("1", (2, 2), 1)))[0, 0].tolist() == [255] * 3
    cmyk = pixels(saved(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG", quality=100))
    assert cmyk.shape == (8, 8, 3) and cmyk.min() > 250
    two = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    gif = saved(two[0], "GIF", save_all=True, append_images=two[1:])
    assert pixels(gif)[0, 0].tolist() == [255, 0, 0]


def test_a_broken_image_is_named():
    whole = encoded(picture(0, 64, 64), "JPEG")
    for data, part in (
        (b"no image", "is not an image in a format that can be read"),
        (whole[: len(whole) // 2], "cannot be read .*truncated"),
        (saved(Image.new("F", (2, 2)), "TIFF"), "cannot be read .*floating-point"),
    ):
        with pytest.raises(ValueError, match=rf"image cats/1\.jpg {part}"):
            decode(data, "cats/1.jpg")
    with pytest.raises(ValueError, match="image cats/1"):
        read_size(io.BytesIO(b"no image"), "cats/1.jpg")


def test_a_folder_with_an_odd_file(tmp_path):
    """Broken metadata cost nothing; a broken image is named, before or while training."""
    junk = damaged_images.exif_block([(0x0112, "H", 6), (0x0100, "s", b"abc")])
    wide = Image.fromarray(picture(0, 192, 320))
    wide.save(tmp_path / "a.jpg", exif=junk)
    wide.save(tmp_path / "b.png", exif=b"junk")
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("a picture")
    source, config = FolderSource(tmp_path), DataConfig(resolution=256, aspect_buckets=True)
    index = bucket_index(source, config)
    assert [index.size(number) for number in range(2)] == [(320, 192), (192, 320)]
    assert np.array_equal(read_image(source, index, 1)["image"], wide)
    avif = saved(wide, "AVIF")
    start = avif.index(b"mdat") + 4
    (tmp_path / "c.avif").write_bytes(avif[:start] + bytes(len(avif) - start))
    source = FolderSource(tmp_path)
    with pytest.raises(ValueError, match=r"image c\.avif cannot be read as an image"):
        read_image(source, bucket_index(source, config), 2)
    (tmp_path / "c.avif").write_bytes(avif[:100])
    with pytest.raises(ValueError, match=r"image c\.avif "):
        bucket_index(source, config)


def test_a_resolution_that_does_not_fit_is_refused():
    with pytest.raises(
        ValueError, match=r"resolution is 500; .* multiple of 64 \(the nearest is 512"
    ):
        make_buckets(500)
