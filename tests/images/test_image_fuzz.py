# SPDX-License-Identifier: Apache-2.0
"""Damaged image files of all formats: a picture or one sentence, in every place that reads them."""

import contextlib
import io
import signal
import warnings

import numpy as np
import pytest
from PIL import Image

from k3jax.images.decoding import _ignore_warnings, load_image
from k3jax.images.masks import read_mask
from k3jax.images.reading import read_image
from k3jax.synthesis.input_images import InputImages, read_inputs
from k3jax.synthesis.samples import Sample
from k3jax.training.data.buckets import decode, fit, read_size

from damaged_images import (
    NOT_DECODED,
    PICTURE,
    damaged,
    encoded,
    exif_block,
    image_files,
    png_chunk,
    random_exif,
    with_exif,
    with_png_chunk,
)


FEW, MANY = 400, 40_000
FEW_BLOCKS, MANY_BLOCKS = 60, 5_000  # EXIF blocks, in each of four formats
HUNG = 30  # seconds; the slowest sound file takes a tenth
PIXELS = 2**20  # instead of Pillow's 89 million: a damaged header must not cost minutes
LOSSLESS = ("BMP RGB", "PNG RGB", "TIFF RGB", "TIFF tiff_lzw", "WEBP lossless", "QOI RGB", "PSD")
TURNS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}
METADATA_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF")


class Hung(BaseException):
    """No exception that a handler of decoders' errors would catch."""


@contextlib.contextmanager
def not_hanging():
    def stop(*_):
        raise Hung

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HUNG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def files():
    return image_files()


def read_everywhere(content: bytes, folder) -> int:
    """Reads a file as the pipelines, data sets and training do; how many of these succeed."""
    path = folder / "input.img"
    path.write_bytes(content)
    sample = Sample(0, "a", 1, "a", width=32, height=32, image=path.name, strength=1.0)
    readers = (
        lambda: read_image(path),
        lambda: read_mask(path),
        lambda: read_size(io.BytesIO(content), path.name),
        lambda: fit(decode(content, path.name), (32, 32)),
    )
    succeeded = 0
    with not_hanging():
        for read in readers:
            try:
                read()
            except ValueError as error:
                assert path.name in str(error) and "\n" not in str(error), repr(error)
            else:
                succeeded += 1
        result = read_inputs(sample, str(folder))
        assert isinstance(result, InputImages) or path.name in result
    return succeeded


def read_damaged(files, folder, count: int, seed: int) -> int:
    """Reads damaged files; how many of the readers' calls succeeded."""
    rng = np.random.default_rng(seed)
    names, contents = list(files), list(files.values())
    kinds = sorted({name.split()[0] for name in names})
    succeeded = 0
    for number in range(count):
        kind = kinds[number % len(kinds)]
        same = [name for name in names if name.split()[0] == kind]
        name = same[int(rng.integers(len(same)))]
        content = damaged(files[name], contents, rng)
        try:
            succeeded += read_everywhere(content, folder)
        except BaseException as error:
            raise AssertionError(f"input {number}, a damaged {name}: {error!r}") from error
    return succeeded


def test_sound_files_of_all_formats(files, tmp_path):
    Image.init()
    assert {name.split()[0] for name in files} >= set(Image.OPEN) | set(Image.SAVE)
    for name, content in files.items():
        if name.split()[0] in NOT_DECODED:
            assert read_everywhere(content, tmp_path) <= 1, name  # of some, the size is known
            continue
        (tmp_path / "sound.img").write_bytes(content)
        seen = read_image(tmp_path / "sound.img")
        with Image.open(io.BytesIO(content)) as image:
            size, mode = image.size, image.mode
        assert seen.shape in ((*size[::-1], 3), (*size, 3)), name
        assert mode == "F" or np.array_equal(decode(content, name), seen), name
    for name in LOSSLESS:
        with Image.open(io.BytesIO(files[name])) as image:
            assert np.array_equal(image.convert("RGB"), PICTURE), name
        assert np.array_equal(decode(files[name], name), PICTURE), name


def test_damaged_files(files, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", PIXELS)
    succeeded = read_damaged(files, tmp_path, FEW, seed=0)
    assert 0.05 < succeeded / (4 * FEW) < 0.95  # some damage is harmless, some is not


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_damaged_files(files, tmp_path, monkeypatch, seed):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", PIXELS)
    read_damaged(files, tmp_path, MANY // 4, seed)


def read_with_random_exif(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    straight = {kind: np.asarray(decode(encoded(PICTURE, kind), kind)) for kind in METADATA_FORMATS}
    for number in range(count):
        block, orientation = random_exif(rng)
        for kind in METADATA_FORMATS:
            content = with_exif(kind, block)
            with not_hanging():
                seen = np.asarray(decode(content, kind))
                size = read_size(io.BytesIO(content), kind)
            if kind == "AVIF":
                expected = [6]  # of the header
            else:
                expected = TURNS if orientation is None else [orientation]
            turns = [o for o in expected if np.array_equal(TURNS[o](straight[kind]), seen)]
            assert turns, f"block {number} in a {kind}"
            assert size == seen.shape[1::-1], f"block {number} in a {kind}"


def test_random_exif_costs_no_pixels():
    read_with_random_exif(FEW_BLOCKS, seed=0)


@pytest.mark.slow
def test_much_random_exif_costs_no_pixels():
    read_with_random_exif(MANY_BLOCKS, seed=1)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path, order, orientation):
    """Applied once, whatever the other tags are; other readers and Pillow agree where they can."""
    right = exif_block([(0x0112, "H", orientation)], order)
    odd = [
        (0x0100, "s", b"abc"),
        (0x0112, "H", orientation),
        (0x011A, "s", b"abc\0"),
        (0x0128, "s", b"x\0"),
        (0x8769, "L", 2**32 - 1),
        (0x8825, "s", b"gps"),
    ]
    for kind in ("JPEG", "PNG", "WEBP"):
        straight = decode(encoded(PICTURE, kind), kind)
        expected = TURNS[orientation](np.asarray(straight))
        for block in (right, exif_block(odd, order)):
            content = encoded(PICTURE, kind, exif=block)
            (tmp_path / "turned").write_bytes(content)
            assert np.array_equal(read_image(tmp_path / "turned"), expected)
            assert np.array_equal(decode(content, kind), expected)
            assert read_size(io.BytesIO(content), kind) == expected.shape[1::-1]
            with Image.open(tmp_path / "turned") as image:
                assert np.array_equal(read_image(image), expected)
            once = load_image(io.BytesIO(content), kind)
            assert np.array_equal(read_image(once), expected)
    for kind in ("TIFF", "AVIF", "MPO"):  # Pillow turns TIFFs itself; AVIFs have it in the header
        content = encoded(PICTURE, kind, exif=right)
        expected = TURNS[orientation](np.asarray(decode(encoded(PICTURE, kind), kind)))
        assert np.array_equal(decode(content, kind), expected)
        assert np.array_equal(read_image(Image.open(io.BytesIO(content))), expected)


@pytest.mark.parametrize(
    "block",
    [
        b"junk",
        b"Exif\0\0",
        b"Exif\0\0II*\0",
        b"Exif\0\0II*\0\xff\xff\xff\x7f",
        exif_block([(0x0112, "s", b"6\0")]),
        exif_block([(0x0112, "H", 9)]),
        exif_block([(0x0112, "H", 0)]),
        exif_block([(0x0112, "f", float("nan"))]),
        b"Exif\0\0XX*\0" + exif_block([(0x0112, "H", 6)])[10:],
    ],
)
def test_without_a_readable_orientation_pixels_are_as_stored(block):
    for kind in ("JPEG", "PNG", "WEBP"):
        content = encoded(PICTURE, kind, exif=block)
        straight = decode(encoded(PICTURE, kind), kind)
        assert np.array_equal(decode(content, kind), straight)
        assert read_size(io.BytesIO(content), kind) == PICTURE.size


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"eXIf", b"junk"),
        png_chunk(b"eXIf", exif_block([(0x0112, "H", 1)])[6:], sound=False),
        png_chunk(b"tEXt", b"comment\0hello", sound=False),
        png_chunk(b"pHYs", b"\0"),
        png_chunk(b"iCCP", b"name\0\0not compressed"),
        png_chunk(b"acTL", b"\0"),
        png_chunk(b"zTXt", b"a\0\x63junk"),
    ],
)
def test_broken_chunks_of_a_png_cost_no_pixels(chunk):
    content = with_png_chunk(encoded(PICTURE, "PNG"), chunk)
    assert np.array_equal(decode(content, "a.png"), PICTURE)
    assert read_size(io.BytesIO(content), "a.png") == PICTURE.size
    turned = with_png_chunk(content, png_chunk(b"eXIf", exif_block([(0x0112, "H", 6)])[6:]))
    if b"eXIf" not in chunk:
        assert np.array_equal(decode(turned, "a.png"), np.rot90(PICTURE, -1))


def test_an_error_reads_the_same_in_every_process(files):
    """It becomes part of a data set, which a restart must not change."""
    for name in ("DDS RGB", "AVIF RGB", "JPEG RGB"):
        messages = set()
        for _ in range(3):
            with pytest.raises(ValueError) as caught:
                decode(files[name][:60], name)
            messages.add(str(caught.value))
        assert len(messages) == 1 and "0x" not in messages.pop()


def test_warnings_of_pillow(monkeypatch):
    """Not shown of their own accord; as errors, if somebody wants them to be."""
    content = encoded(PICTURE, "JPEG", exif=b"Exif\0\0II*\0")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        warnings.filters.pop(0)  # no filter but the interpreter's default
        _ignore_warnings.cache_clear()
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", PICTURE.width * PICTURE.height - 1)
        decode(content, "a.jpg")
    assert not shown
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"a\.jpg has too many pixels to be decoded .*bomb"):
            decode(content, "a.jpg")
        monkeypatch.undo()
        for orientation in (1, 6):
            block = exif_block([(0x0100, "H", 1), (0x0112, "H", orientation)])[:-4]
            image = decode(encoded(PICTURE, "PNG", exif=block), "a.png")
            assert np.array_equal(image, TURNS[orientation](np.asarray(PICTURE)))
    _ignore_warnings.cache_clear()
