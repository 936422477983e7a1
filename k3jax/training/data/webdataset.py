# SPDX-License-Identifier: Apache-2.0
"""WebDataset tars, indexed once, so that any sample needs one seek."""

import array
import io
import json
import os
import tarfile
from collections.abc import Iterable
from typing import BinaryIO

from k3jax.training.data.source import IMAGE_SUFFIXES, Source, check_utf8


CAPTION_FIELDS = ("caption", "prompt", "text")


class WebDatasetSource(Source):
    """The samples of tars: members of a tar with the same file name up to its first dot.

    A sample has an image and a caption: the text of a `.txt` member, or a field of a `.json` member
    (`caption_column`, caption, prompt or text). Samples without an image are skipped.
    """

    def __init__(self, paths: list[str], caption_column: str = "caption"):
        """
        Raises:
            ValueError: a file is not a tar, compressed or truncated; a sample has no caption.
        """
        self._paths = [os.path.abspath(path) for path in paths]
        self._tar = array.array("i")
        self._offset, self._length = array.array("q"), array.array("q")
        self._keys: list[str] = []
        self._captions: list[str] = []
        prefixes = _prefixes(self._paths)
        for number, path in enumerate(self._paths):
            self._index(number, path, prefixes[number], caption_column)
        if not self._keys:
            raise ValueError(
                f"{', '.join(paths)}: the tars hold no images (members that end in "
                f"{', '.join(IMAGE_SUFFIXES)})."
            )

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, number: int) -> str:
        return self._keys[number]

    def caption(self, number: int) -> str:
        return self._captions[number]

    def open(self, number: int) -> BinaryIO:
        path = self._paths[self._tar[number]]
        return io.BufferedReader(_Member(path, self._offset[number], self._length[number]))

    def rows(self) -> Iterable[tuple]:
        return zip(self._keys, self._captions, strict=True)

    def files(self) -> list[str]:
        return self._paths

    def _index(self, number: int, path: str, prefix: str, caption_column: str) -> None:
        samples = _members(path)
        with open(path, "rb") as file:
            for name, members in samples.items():
                image = _image_member(members)
                if image is None:
                    continue
                key = prefix + name
                self._tar.append(number)
                self._offset.append(members[image][0])
                self._length.append(members[image][1])
                self._keys.append(key)
                self._captions.append(_caption(file, path, name, members, caption_column))


class _Member(io.RawIOBase):
    """Part of a file, opened for one reader: there may be more tars than open files are allowed."""

    def __init__(self, path: str, offset: int, length: int):
        self._file = open(path, "rb", buffering=0)
        self._offset, self._length, self._at = offset, length, 0

    def close(self) -> None:
        self._file.close()
        super().close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer) -> int:
        count = max(0, min(len(buffer), self._length - self._at))
        self._file.seek(self._offset + self._at)
        count = self._file.readinto(memoryview(buffer)[:count])
        self._at += count
        return count


def _prefixes(paths: list[str]) -> list[str]:
    """`00000/` for 00000.tar; with as much of the path as distinguishes the tars."""
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [f"{os.path.splitext(os.path.relpath(path, common))[0]}/" for path in paths]


def _members(path: str) -> dict[str, dict[str, tuple[int, int]]]:
    """Sample name -> {suffix in lower case: (offset, length)}, in the order of the tar."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    end = os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members.clear()  # it keeps all members
                folder, _, file = member.name.rpartition("/")
                stem, dot, suffix = file.partition(".")
                if not member.isreg() or not stem or not dot:
                    continue
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError(f"{member.name} is cut off")
                parts = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
                if suffix.lower() in parts:
                    raise tarfile.ReadError(f"{member.name} is in it twice")
                parts[suffix.lower()] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ValueError(
            f"{path} cannot be read as an uncompressed tar ({error}): download or write it again."
        ) from None
    return samples


def _image_member(members: dict) -> str | None:
    """The suffix of a sample's image: `jpg` before `input.jpg`."""
    images = [suffix for suffix in members if f".{suffix}".endswith(IMAGE_SUFFIXES)]
    return min(images, key=lambda suffix: (suffix.count("."), suffix), default=None)


def _caption(file: BinaryIO, path: str, name: str, members: dict, column: str) -> str:
    def text(suffix: str) -> str:
        file.seek(members[suffix][0])
        data = file.read(members[suffix][1]).decode("utf-8-sig", "surrogateescape")
        return check_utf8(data, f"{path}: {name}.{suffix}")

    fields = {}
    if "json" in members:
        try:
            fields = json.loads(text("json"))
        except ValueError as error:
            raise ValueError(f"{path}: {name}.json is not JSON ({error}).") from None
        if not isinstance(fields, dict):
            fields = {}
    candidates = [fields.get(column)]
    candidates += [text("txt")] if "txt" in members else []
    candidates += [fields.get(field) for field in CAPTION_FIELDS]
    for candidate in candidates:
        if isinstance(candidate, str) and candidate.strip():
            return check_utf8(candidate.strip(), f"{path}: the caption of {name}")
    there = f"; its JSON has {', '.join(fields)}" if fields else ""
    raise ValueError(
        f"{path}: sample {name} has no caption, neither in {name}.txt nor in a field "
        f"{', '.join(dict.fromkeys((column, *CAPTION_FIELDS)))} of {name}.json{there}."
    )
