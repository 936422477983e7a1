# SPDX-License-Identifier: Apache-2.0
"""PNG files with the settings of their image, and contact sheets of several images."""

import contextlib
import json
import math
import os
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from k3jax.images.decoding import opened


KEY = "k3jax"
"""The text chunk that holds the settings as JSON; `prompt` and `seed` have one each for readers."""

SLUG_CHARACTERS, SLUG_BYTES = 48, 120  # far below the 255 bytes of a file name
SHEET_SIZE = 2048  # pixels; about the side of a contact sheet
SHEET_IMAGES = 1024  # smaller than in a 32 x 32 grid nothing can be seen
CELL_SIZES = (64, 512)
BACKGROUND, INK = (255, 255, 255), (60, 60, 60)


def slug(text: str) -> str:
    """A prompt as part of a file name: letters and digits of any script, the rest as hyphens."""
    words, word = [], ""
    for character in unicodedata.normalize("NFC", text.lower()):
        if character.isalnum() or unicodedata.category(character).startswith("M"):
            word += character
        elif word:
            words.append(word)
            word = ""
    cut = "-".join(filter(None, [*words, word]))[:SLUG_CHARACTERS]
    return cut.encode()[:SLUG_BYTES].decode(errors="ignore").rstrip("-")


def file_name(index: int, seed: int, prompt: str) -> str:
    """`0003_seed7_a-red-circle.png`, for image 3 of a run."""
    words = slug(prompt)
    return f"{index:04d}_seed{seed}{f'_{words}' if words else ''}.png"


def write_png(image: Image.Image, path: Path, settings: Mapping[str, Any] | None = None) -> None:
    """Writes an image whole or not at all, replacing what is there.

    Args:
        settings: anything that JSON can hold. The `prompt` and `seed` of its `call` also get text
            chunks of their own.
    """
    info = PngInfo()
    if settings is not None:
        info.add_text(KEY, json.dumps(settings))
        for key in ("prompt", "seed"):
            if key in settings.get("call", {}):
                info.add_itxt(key, str(settings["call"][key]))
    part = path.with_name(f".{path.name[:80]}.{os.getpid()}.part")
    try:
        image.save(part, "PNG", pnginfo=info)
        os.replace(part, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings of an image. `pipe(**read_settings(path)["call"])` reproduces it.

    Raises:
        ValueError: the file is no PNG that k3jax wrote.
    """
    try:
        with open(path, "rb") as file, opened(file, str(path)) as image:
            text = getattr(image, "text", {}).get(KEY)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        settings = None if text is None else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} has a text chunk {KEY!r} that is not JSON ({error}).") from None
    if settings is None:
        raise ValueError(f"{path} was not written by k3jax: it has no text chunk {KEY!r}.")
    return settings


class ContactSheet:
    """A grid of small images with captions, filled one by one; it keeps only the small ones."""

    def __init__(self, count: int, width: int, height: int, multiple: int = 1):
        """
        Args:
            count: number of images to come; the sheet shows the first SHEET_IMAGES.
            width, height: pixels of the images.
            multiple: the columns are one of so many, as of 2 for pairs of images.
        """
        shown = min(count, SHEET_IMAGES)
        self._columns = math.ceil(math.sqrt(shown * height / width) / multiple) * multiple
        least, most = CELL_SIZES
        side = min(most, max(least, SHEET_SIZE // self._columns), width)
        self._cell = (side, max(1, round(side * height / width)))
        self._count = shown
        self._text_size = max(9, min(16, side // 18))
        self._cells: list[tuple[Image.Image, str]] = []

    def add(self, image: Image.Image, caption: str) -> None:
        """Puts an image in the next cell; the caption is cut to two lines."""
        if len(self._cells) < self._count:
            self._cells.append((image.convert("RGB").resize(self._cell), caption))

    def image(self) -> Image.Image:
        """The sheet of the images so far."""
        width, height = self._cell
        gap, line = max(2, width // 32), self._text_size + 3
        step_x, step_y = width + gap, height + gap + 2 * line
        rows = math.ceil(len(self._cells) / self._columns)
        sheet = Image.new("RGB", (gap + self._columns * step_x, gap + rows * step_y), BACKGROUND)
        draw = ImageDraw.Draw(sheet)
        for number, (cell, caption) in enumerate(self._cells):
            x = gap + number % self._columns * step_x
            y = gap + number // self._columns * step_y
            sheet.paste(cell, (x, y))
            font = _font(caption, self._text_size)
            for row, text in enumerate(_lines(caption, font, width)):
                draw.text((x, y + height + row * line), text, fill=INK, font=font)
        return sheet


def _lines(text: str, font, width: int, most: int = 2) -> list[str]:
    """Text broken into lines of at most `width` pixels, the last one cut short."""
    words, lines = " ".join(text.split()), []
    while words and len(lines) < most:
        end = len(words)
        while end > 1 and font.getlength(words[:end]) > width:
            end -= max(1, end // 8)
        last = len(lines) == most - 1
        if end < len(words) and not last and " " in words[: end + 1].strip():
            end = words[: end + 1].rstrip().rindex(" ")
        line, words = words[:end].strip(), words[end:].strip()
        lines.append(f"{line[:-3]}..." if last and words else line)
    return lines


def _font(text: str, size: int):
    """Pillow's own font has only Latin letters: for others a common one of the system, if any."""
    if not text.isascii():
        for name in ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf"):
            with contextlib.suppress(OSError):
                return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)
