# SPDX-License-Identifier: Apache-2.0
"""A folder of images with captions in metadata files, text files or the PNGs."""

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from k3jax.images.decoding import opened
from k3jax.training.data.source import IMAGE_SUFFIXES, Source, check_utf8


METADATA = ("metadata.jsonl", "metadata.csv")
CONTACT_SHEET = "contact_sheet"


class FolderSource(Source):
    """Images in a folder and its subfolders, sorted by path. A caption comes from the first of:

    1. metadata.jsonl or metadata.csv in its folder or one above, with a `file_name` relative to
       that file and a column of captions (the imagefolder convention of Hugging Face datasets);
    2. a text file with the same stem in the same folder;
    3. a PNG's text chunk `prompt`, which `k3jax generate` writes.
    """

    def __init__(self, folder: str | Path, caption_column: str = "caption"):
        """
        Raises:
            ValueError: no such folder, no image in it, an image without caption, or a wrong
                metadata file.
        """
        self._folder = Path(folder)
        if not self._folder.is_dir():
            raise ValueError(f"{folder} is not a folder of images: there is no such folder.")
        images, metadata = _walk(self._folder)
        captions: dict[str, str] = {}
        for path in metadata:  # subfolders come last: the nearest file wins
            captions.update(_read_metadata(path, self._folder, caption_column))
        for name in captions.keys() - set(images):
            if not (self._folder / name).is_file():
                raise ValueError(
                    f"{folder}: a metadata file names {name}, which does not exist: add the image "
                    "or remove its line."
                )
            images.append(name)  # with any suffix
        self._names: list[str] = []
        self._captions: list[str] = []
        for name in sorted(images):
            caption = captions.get(name)
            if caption is None:
                caption = _caption_beside(self._folder / name)
            if caption is None and Path(name).name.startswith(CONTACT_SHEET):
                continue  # `k3jax generate` writes one with its images
            if not caption:
                raise ValueError(
                    f"{self._folder / name} has no caption: write it into "
                    f"{Path(name).with_suffix('.txt')}, or list the image in a metadata.jsonl."
                )
            self._names.append(name)
            self._captions.append(caption)
        if not self._names:
            raise ValueError(
                f"{folder} holds no images (files that end in {', '.join(IMAGE_SUFFIXES)})."
            )

    def __len__(self) -> int:
        return len(self._names)

    def key(self, number: int) -> str:
        return self._names[number]

    def caption(self, number: int) -> str:
        return self._captions[number]

    def open(self, number: int) -> BinaryIO:
        return open(self._folder / self._names[number], "rb")

    def rows(self) -> Iterable[tuple]:
        return zip(self._names, self._captions, strict=True)

    def files(self) -> list[str]:
        return [os.path.join(self._folder, name) for name in self._names]


def _walk(folder: Path) -> tuple[list[str], list[Path]]:
    """Images, relative to `folder` with forward slashes, and metadata files; no hidden ones."""
    images, metadata, walked = [], [], set()
    for at, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(at) in walked:  # links can form a cycle
            folders.clear()
            continue
        walked.add(os.path.realpath(at))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = Path(at)
        found = [here / name for name in METADATA if name in files]
        if len(found) > 1:
            raise ValueError(f"{here} has both {' and '.join(METADATA)}: keep one of them.")
        metadata += found
        for name in files:
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                images.append((here / name).relative_to(folder).as_posix())
    return images, metadata


def _read_metadata(path: Path, folder: Path, column: str) -> Iterator[tuple[str, str]]:
    """(image relative to `folder`, caption) of each line."""
    rows = _json_lines(path) if path.suffix == ".jsonl" else _csv_rows(path)
    for line, row in rows:
        if column == "caption" not in row and "prompt" in row:  # of data sets that k3jax wrote
            column = "prompt"
        for name in ("file_name", column):
            if name not in row:
                raise ValueError(
                    f"{path}, line {line}: there is no {name!r}; there is {', '.join(row)}. The "
                    "column of captions is `caption_column`."
                )
        caption = row[column]
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"{path}, line {line}: {column!r} must be a text, not {caption!r}.")
        check_utf8(caption, f"{path}, line {line}: {column!r}")
        image = os.path.normpath(path.parent / str(row["file_name"]))
        yield Path(os.path.relpath(image, folder)).as_posix(), caption.strip()


def _json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            check_utf8(line, f"{path}, line {number}")
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not JSON ({error}).") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} must be a JSON object.")
            yield number, row


def _csv_rows(path: Path) -> Iterator[tuple[int, dict]]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = (check_utf8(line, f"{path}, line {n}") for n, line in enumerate(file, 1))
        reader = csv.DictReader(lines, strict=True)
        try:
            columns = reader.fieldnames or []
            if len(columns) == 1 and (other := re.search(r"[;\t]", columns[0])):
                raise ValueError(
                    f"{path}, line 1: the columns are separated by {other[0]!r}; they must be "
                    "separated by commas."
                )
            for row in reader:
                if None in row:
                    raise ValueError(
                        f"{path}, line {reader.line_num}: there are {len(columns)} columns, but "
                        f"{len(columns) + len(row[None])} values: put a text with commas "
                        "into double quotes."
                    )
                yield reader.line_num, row
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {reader.line_num + 1} is not CSV ({error}): put a text with "
                "quotes into double quotes, and double the quotes inside."
            ) from None


def _caption_beside(image: Path) -> str | None:
    beside = image.with_suffix(".txt")
    try:
        text = beside.read_text(encoding="utf-8-sig", errors="surrogateescape")
        return check_utf8(text, str(beside)).strip()
    except FileNotFoundError:
        pass
    if image.suffix.lower() != ".png":
        return None
    try:
        with open(image, "rb") as file, opened(file, str(image)) as png:
            text = png.info.get("prompt")
    except (OSError, ValueError):
        return None  # all images are checked later
    return text.strip() if isinstance(text, str) else None
