# SPDX-License-Identifier: Apache-2.0
"""File names, PNG text chunks and contact sheets."""

import numpy as np
import pytest
from PIL import Image, ImageFont
from PIL.PngImagePlugin import PngInfo

from k3jax.images import pngs as images


def picture(width=64, height=64, colour=(200, 30, 30)):
    return Image.new("RGB", (width, height), colour)


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("A red circle, 50% grey!", "a-red-circle-50-grey"),
        ("Рыжий ЩЕНОК", "рыжий-щенок"),
        ("../../etc/passwd", "etc-passwd"),
        ("हिन्दी", "हिन्दी"),
        ("🐈", ""),
        ("", ""),
    ],
)
def test_slug(prompt, expected):
    assert images.slug(prompt) == expected


@pytest.mark.parametrize("prompt", ["word " * 4000, "猫" * 4000, "a\nb\tc" * 4000])
def test_file_names_are_short(prompt):
    name = images.file_name(12345, 2**64 - 1, prompt)
    assert len(name.encode()) < 200 and not set(name) & set("/\\\n\t ")
    assert len(images.slug(prompt)) <= 60


def test_file_name():
    assert images.file_name(3, 7, "a cat") == "0003_seed7_a-cat.png"
    assert images.file_name(0, 0, "!") == "0000_seed0.png"


def test_settings_come_back(tmp_path):
    settings = {"call": {"prompt": 'кот\nи "пёс" 🐈', "seed": 2**64 - 1}, "dtype": "float32"}
    path = tmp_path / "a.png"
    images.write_png(picture(), path, settings)
    assert images.read_settings(path) == settings
    with Image.open(path) as image:
        assert image.text["prompt"] == settings["call"]["prompt"]
        assert image.text["seed"] == str(2**64 - 1)
        np.testing.assert_array_equal(np.asarray(image), np.asarray(picture()))
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(self, file, *args, **kwargs):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    images.write_png(picture(), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space"):
        images.write_png(picture(), tmp_path / "a.png")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == before


def test_read_settings_refuses_other_files(tmp_path):
    picture().save(tmp_path / "other.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"other.png was not written by k3jax"):
        images.read_settings(tmp_path / "other.png")
    with pytest.raises(ValueError, match=r"text.png is not an image in a format that can be read"):
        images.read_settings(tmp_path / "text.png")
    images.write_png(picture(), tmp_path / "whole.png", {"call": {"prompt": "a" * 500}})
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "short.png").write_bytes(content[:300])
    (tmp_path / "changed.png").write_bytes(content.replace(b"aaaaaa", b"aaa\0aa"))
    for name in ("short.png", "changed.png"):
        with pytest.raises(ValueError, match=rf"{name} .*: save it (again )?as PNG"):
            images.read_settings(tmp_path / name)
    info = PngInfo()
    info.add_text(images.KEY, "{")
    picture().save(tmp_path / "json.png", pnginfo=info)
    with pytest.raises(ValueError, match=r"json.png has a text chunk 'k3jax' that is not JSON"):
        images.read_settings(tmp_path / "json.png")
    with pytest.raises(FileNotFoundError):
        images.read_settings(tmp_path / "none.png")


@pytest.mark.parametrize("count, width, height", [(2, 64, 64), (7, 1024, 512), (30, 512, 1024)])
def test_contact_sheet(count, width, height):
    sheet = images.ContactSheet(count, width, height)
    for number in range(count):
        sheet.add(picture(width, height, (0, 0, 255)), f"{number} a prompt " * 20)
    made = np.asarray(sheet.image())
    blue = (made == (0, 0, 255)).all(axis=-1).mean()
    assert 0.4 < blue < 1
    assert max(made.shape) < 3500


def test_contact_sheet_of_many_is_of_limited_size():
    sheet = images.ContactSheet(5000, 1024, 1024)
    small = picture(16, 16)
    for number in range(5000):
        sheet.add(small, f"{number}")
    assert max(sheet.image().size) < 4000


@pytest.mark.parametrize("caption", ["", "рыжий кот", "猫" * 300, "x" * 1000, "🐈 a\ncat"])
@pytest.mark.parametrize("system_fonts", [True, False])
def test_captions_of_any_script(caption, system_fonts, monkeypatch):
    if not system_fonts:

        def none(*args):
            raise OSError("cannot open resource")

        default = ImageFont.load_default(12)
        monkeypatch.setattr(ImageFont, "load_default", lambda size: default)
        monkeypatch.setattr(ImageFont, "truetype", none)
    sheet = images.ContactSheet(1, 64, 64)
    sheet.add(picture(), caption)
    assert sheet.image().size[0] >= 64


def test_lines_fit():
    font = ImageFont.load_default(12)
    text = "0001 seed 7 " + "a long prompt about a cat " * 10
    lines = images._lines(text, font, 200)
    assert len(lines) == 2 and lines[-1].endswith("...")
    assert all(font.getlength(line) <= 212 for line in lines)
    assert images._lines("short", font, 200) == ["short"]
