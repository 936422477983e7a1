# SPDX-License-Identifier: Apache-2.0
"""Image files, decoded: the one place where images that people bring are read by Pillow.

Whatever a decoder raises becomes one ValueError that names the image. Metadata never cost the
pixels: the orientation is applied where it can be read, and an image whose other metadata are
broken is read without them.
"""

import contextlib
import functools
import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar

from PIL import Image, UnidentifiedImageError


ORIENTATION = 0x0112  # the EXIF tag
SHORT = 3  # the number of its type
BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
METADATA = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
"""Keys of an image's `info` that can hold an orientation."""

REFUSED = {  # Pillow would start Ghostscript, which may never end
    "EPS": "PostScript is a program, which is not run",
    "IPTC": "it can hold PostScript, a program, which is not run",
}
LONGEST_REASON = 200  # characters of a decoder's message

HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
HEIF_ADVICE = (
    "pip install pillow-heif and call pillow_heif.register_heif_opener(), or save it as JPEG or PNG"
)

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
EXIF_ITEM = re.compile(rb"(infe(?:\x02.{3}.{4}|\x03.{3}.{6}))Exif", re.DOTALL)

T = TypeVar("T")


def load_image(file: BinaryIO, name: str) -> Image.Image:
    """An image file as an upright image, decoded to its end; the first image of several.

    Raises:
        ValueError: it cannot be decoded; the message starts with `name`.
    """
    return _read(file, name, _upright)


def upright(image: Image.Image, name: str) -> Image.Image:
    """An image that Pillow has opened, decoded to its end and upright.

    Raises:
        ValueError: it cannot be decoded; the message starts with `name`.
    """
    file = getattr(image, "filename", "")
    with decoding(f"{name} ({file})" if file else name):
        _check_format(image)
        return _upright(image)


def read_size(file: BinaryIO, name: str) -> tuple[int, int]:
    """(width, height) of the upright image, from the file's header only.

    Raises:
        ValueError: the header cannot be decoded; the message starts with `name`.
    """
    return _read(file, name, _upright_size)


@contextlib.contextmanager
def opened(file: BinaryIO, name: str) -> Iterator[Image.Image]:
    """An image file, opened by Pillow; a context in which every exception is a decoder's."""
    _ignore_warnings()
    with decoding(name), Image.open(file) as image:
        _check_format(image)
        yield image


@contextlib.contextmanager
def decoding(name: str) -> Iterator[None]:
    """A context of calls of Pillow alone: what they raise becomes a ValueError about `name`.

    Decoders raise nearly every kind of exception on damaged files: struct.error, TypeError,
    RuntimeError, NotImplementedError, SyntaxError, OSError, EOFError, IndexError, KeyError...
    """
    try:
        yield
    except MemoryError:
        raise  # not the file's fault
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{name} is not an image in a format that can be read, or it is damaged: save it as "
            "PNG or JPEG, or leave it out."
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{name} has too many pixels to be decoded (it could be a decompression bomb; the "
            f"limit is {2 * Image.MAX_IMAGE_PIXELS:,}): make it smaller, or leave it out."
        ) from error
    except Exception as error:
        raise ValueError(
            f"{name} cannot be read as an image ({_reason(error)}): save it again as PNG or JPEG, "
            "or leave it out."
        ) from error


def _read(file: BinaryIO, name: str, read: Callable[[Image.Image], T]) -> T:
    """`read` of an image file; if that fails, of the file without its metadata."""
    try:
        with opened(file, name) as image:
            return read(image)
    except ValueError:
        if file.closed:  # the decoder of FTEX does that
            raise
        with decoding(name):
            file.seek(0)
            content = file.read()
            pixels = _without_metadata(content)
        if content[4:8] == b"ftyp" and content[8:12] in HEIF_BRANDS:
            raise ValueError(f"{name} is HEIC, which cannot be read: {HEIF_ADVICE}.") from None
        if pixels is not None:
            with contextlib.suppress(ValueError), opened(io.BytesIO(pixels), name) as image:
                return read(image)
        raise


def _check_format(image: Image.Image) -> None:
    if image.format in REFUSED:
        raise ValueError(REFUSED[image.format])


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode == "P" and image.palette is None:  # Pillow keeps that of an ICNS only in C
        image.putpalette(image.im.getpalette())
    turn = TURNS.get(_orientation(image))
    if turn is None:
        return image
    turned = image.transpose(turn)
    for key in METADATA:  # nobody shall turn it again
        turned.info.pop(key, None)
    return turned


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    if image.format == "TIFF":  # Pillow gives the size of some turned ones as upright
        width, height = image.tag_v2[256], image.tag_v2[257]
    # getexif() of a PNG without EXIF data would decode all of it.
    has_exif = image.format != "PNG" or "exif" in image.info
    turned = has_exif and _orientation(image) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1 where it cannot be read.

    Other tags are not decoded, as `ImageOps.exif_transpose` does, so they cannot fail.
    """
    try:
        value = image.getexif().get(ORIENTATION)
    except MemoryError:
        raise
    except Exception:
        value = None
    if value is None and isinstance(block := image.info.get("exif"), bytes):
        value = _orientation_in(block)
    return value if isinstance(value, int) and value in TURNS else 1


def _orientation_in(block: bytes) -> int | None:
    """The orientation in an EXIF block: Pillow stops at the first tag that points out of it."""
    tiff = block.removeprefix(b"Exif\0\0")
    with contextlib.suppress(struct.error, KeyError):  # the block ends before
        order = BYTE_ORDERS[tiff[:4]]
        (start,) = struct.unpack_from(f"{order}L", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for number in range(count):
            tag, kind, _, value = struct.unpack_from(
                f"{order}HHLHxx", tiff, start + 2 + 12 * number
            )
            if tag == ORIENTATION and kind == SHORT:
                return value
    return None


def _without_metadata(content: bytes) -> bytes | None:
    """The file with nothing but its pixels and a sound orientation; None if it is not known how."""
    if content.startswith(PNG_SIGNATURE):
        return _essential_png(content)
    if content[4:8] == b"ftyp":
        # AVIF, whose orientation is in its header. An item of unknown type is passed over.
        return EXIF_ITEM.sub(rb"\1none", content)
    return None


def _essential_png(content: bytes) -> bytes:
    """Without ancillary chunks, but for transparency and sound EXIF blocks."""
    kept, at = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while at < len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4])
        kind = content[at + 4 : at + 8]
        sound = zlib.crc32(content[at + 4 : end - 4]).to_bytes(4) == content[end - 4 : end]
        if not kind[:1].islower() or kind == b"tRNS" or (kind == b"eXIf" and sound):
            kept.append(content[at:end])
        at = end
    return b"".join(kept)


def _reason(error: Exception) -> str:
    """A decoder's message on one line; the same for the same file in every process."""
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(str(error).split()))
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text[:LONGEST_REASON].rstrip(".") or type(error).__name__


@functools.cache
def _ignore_warnings() -> None:
    """No warnings of Pillow's own about odd metadata and large images, whose pixels are used.

    The filter is added once, because threads share filters, and after all others, so that the
    user's own win.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.", append=True)
