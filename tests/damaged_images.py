# SPDX-License-Identifier: Apache-2.0
"""Image files of every format that Pillow opens, EXIF blocks, and damage to both."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


WIDTH, HEIGHT = 40, 24
MODES = ("RGB", "RGBA", "P", "L", "LA", "1", "CMYK", "I;16", "F")
TIFFS = ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "group4")
NOT_DECODED = {"EPS", "IPTC", "BUFR", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"}
"""Formats that are or can hold programs, and those of which Pillow decodes no pixels."""


def sharp_picture() -> np.ndarray:
    """uint8 (HEIGHT, WIDTH, 3), different in each of its eight orientations."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([x * 6, y * 10, (x > y) * 200], axis=-1).astype(np.uint8)


PICTURE = Image.fromarray(sharp_picture())


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def image_files() -> dict[str, bytes]:
    """Sound files by name, of which the part up to the first space is the format."""
    Image.init()
    files = {}
    for kind in sorted(Image.SAVE):
        for mode in MODES:
            if (kind, mode) == ("SPIDER", "I;16"):
                continue  # floats up to 65535, a range that cannot be known
            try:
                files[f"{kind} {mode}"] = encoded(_in_mode(mode), kind)
            except (OSError, KeyError, ValueError):
                continue  # the format has no such pixels
    return {**files, **_other_encodings(), **_formats_that_are_only_read()}


def _in_mode(mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(np.asarray(PICTURE.convert("L")).astype(np.uint16) * 257)
    if mode == "F":
        return Image.fromarray(np.asarray(PICTURE.convert("L")).astype(np.float32))
    return PICTURE.convert(mode)


def _other_encodings() -> dict[str, bytes]:
    flipped = PICTURE.transpose(Image.Transpose.ROTATE_180)
    several = {"save_all": True, "append_images": [flipped]}
    files = {
        "JPEG progressive": encoded(PICTURE, "JPEG", progressive=True),
        "WEBP lossless": encoded(PICTURE, "WEBP", lossless=True),
        "JPEG2000 codestream": encoded(PICTURE, "JPEG2000", no_jp2=True),
        "TGA rle": encoded(PICTURE, "TGA", compression="tga_rle"),
        "ICO bmp": encoded(PICTURE, "ICO", bitmap_format="bmp"),
        "PPM plain": b"P3 2 1 255\n1 2 3 4 5 6\n",
    }
    for kind in ("GIF", "PNG", "WEBP", "TIFF", "AVIF", "MPO"):
        files[f"{kind} several"] = encoded(PICTURE, kind, **several)
    for name in TIFFS:
        image = PICTURE.convert("1") if name == "group4" else PICTURE
        files[f"TIFF {name}"] = encoded(image, "TIFF", compression=name)
    for name in ("DXT1", "DXT3", "DXT5", "BC2", "BC3", "BC5"):
        image = PICTURE if name == "BC5" else PICTURE.convert("RGBA")
        files[f"DDS {name}"] = encoded(image, "DDS", pixel_format=name)
    exif = exif_block([(0x0112, "H", 6)])
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO"):
        files[f"{kind} exif"] = encoded(PICTURE, kind, exif=exif)
    return files


def _formats_that_are_only_read() -> dict[str, bytes]:
    """The least files of these formats, by their descriptions."""
    grey = np.asarray(PICTURE.convert("L"))
    raw, size = grey.tobytes(), (WIDTH, HEIGHT)
    planes = np.moveaxis(sharp_picture(), -1, 0).tobytes()
    icon = encoded(PICTURE, "ICO", bitmap_format="bmp", sizes=[size])
    fits = ["SIMPLE  = T", "BITPIX  = 8", "NAXIS   = 2", f"NAXIS1  = {WIDTH}"]
    fits = "".join(card.ljust(80) for card in [*fits, f"NAXIS2  = {HEIGHT}", "END"])
    text = "\n".join(f'"{"".join(".#"[v > 99] for v in row)}",' for row in grey.tolist())
    palette = b"\x01\0" + b"\0\0" + bytes(range(256)) * 3
    chunks = struct.pack("<LH", 6 + len(palette), 4) + palette  # 256 colours
    lines = b"".join(b"\1" + struct.pack("b", -WIDTH) + row.tobytes() for row in grey)
    chunks += struct.pack("<LH", 6 + len(lines), 15) + lines  # runs of bytes
    frame = struct.pack("<LHH8x", 16 + len(chunks), 0xF1FA, 2) + chunks
    fli = struct.pack("<LHHHHHHL108x", 128 + len(frame), 0xAF12, 1, *size, 8, 3, 70)
    mcidas = [0, 0, 0, 0, 0, 0, 0, 0, HEIGHT, WIDTH, 1, 0, 0, 1] + [0] * 50
    mcidas[1], mcidas[33] = 4, 256
    pixar = bytearray(b"\200\350\0\0".ljust(1024, b"\0"))
    struct.pack_into("<HH", pixar, 416, HEIGHT, WIDTH)
    struct.pack_into("<HH", pixar, 424, 14, 2)
    pcx = encoded(PICTURE, "PCX")
    return {
        "CUR": icon[:2] + b"\2" + icon[3:],
        "DCX": struct.pack("<LLL", 0x3ADE68B1, 12, 0) + pcx,
        "FITS": fits.ljust(2880).encode() + raw.ljust(2880, b"\0"),
        "FLI": fli + frame,
        "FTEX": struct.pack("<4s8L", b"FTEX", 0, *size, 1, 1, 1, 32, len(planes)) + planes,
        "GBR": struct.pack(">5L4sL", 32, 2, *size, 1, b"GIMP", 10) + b"abc\0" + raw,
        "GRIB": b"GRIB\0\0\0\1" + raw,
        "BUFR": b"BUFR" + raw,
        "HDF5": b"\x89HDF\r\n\x1a\n" + raw,
        "IMT": f"width {WIDTH}\nheight {HEIGHT}\npixel n8\n\x0c".encode() + raw,
        "IPTC": _iptc(raw),
        "MCIDAS": struct.pack(">64i", *mcidas) + raw,
        "MPEG": b"\0\0\1\xb3" + bytes([2, 0x80, 0x18]) + raw,
        "PCD": (bytes(2048) + b"PCD_").ljust(96 * 2048, b"\0") + bytes(768 * 512 * 3 // 2),
        "PIXAR": bytes(pixar) + sharp_picture().tobytes(),
        "PSD": struct.pack(">4sH6xHLLHHLLLH", b"8BPS", 1, 3, *size[::-1], 8, 3, 0, 0, 0, 0)
        + planes,
        "SUN": struct.pack(">8L", 0x59A66A95, *size, 8, len(raw), 1, 0, 0) + raw,
        "WMF": struct.pack("<LHhhhhH6x", 0x9AC6CDD7, 0, 0, 0, *size, 72) + b"\1\0\t\0" + raw,
        "XPM": f'/* XPM */\nstatic char *a[] = {{\n"{WIDTH} {HEIGHT} 2 1",\n". c #000000",\n'
        f'"# c #ff8000",\n{text}\n}};\n'.encode(),
        "XVTHUMB": f"P7 332\n#END_OF_COMMENTS\n{WIDTH} {HEIGHT} 255\n".encode() + raw,
    }


def _iptc(raw: bytes) -> bytes:
    def field(record: int, data_set: int, value: bytes) -> bytes:
        return struct.pack(">BBBH", 0x1C, record, data_set, len(value)) + value

    return (
        field(3, 60, b"\1\0")
        + field(3, 20, struct.pack(">L", WIDTH))
        + field(3, 30, struct.pack(">L", HEIGHT))
        + field(3, 120, b"\1")
        + field(8, 10, raw)
    )


def exif_block(tags, order: str = "<") -> bytes:
    """An EXIF block.

    Args:
        tags: (tag, struct's letter of its type or "s" for text, value), values of at most 4 bytes.
        order: "<" or ">".
    """
    types = {"B": 1, "s": 2, "H": 3, "L": 4, "b": 6, "h": 8, "l": 9, "f": 11}
    entries = []
    for tag, letter, value in tags:
        packed = value if letter == "s" else struct.pack(order + letter, value)
        count = len(value) if letter == "s" else 1
        entries.append((tag, types[letter], count, packed))
    return exif_entries(entries, order)


def exif_entries(entries, order: str = "<") -> bytes:
    """An EXIF block of (tag, number of a type, count, at most 4 bytes)."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "LH", 8, len(entries))
    rows = [struct.pack(order + "HHL", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries]
    return b"Exif\0\0" + head + b"".join(rows) + b"\0\0\0\0"


def random_exif(rng: np.random.Generator) -> tuple[bytes, int | None]:
    """An EXIF block of tags that may be of any type, and the orientation in it.

    The orientation is None where the block is damaged besides, so that it may be lost.
    """
    order = str(rng.choice(["<", ">"]))
    known = (0x0100, 0x0101, 0x010F, 0x011A, 0x0128, 0x8769, 0x8825, 0x927C, 0xA005, 0x02BC)
    entries = []
    for _ in range(rng.integers(0, 8)):
        tag = int(rng.choice(known) if rng.random() < 0.8 else rng.integers(2**16))
        if tag == 0x0112:
            continue
        kind = int(rng.integers(0, 20))
        count = int(rng.choice([0, 1, 1, 2, 4, 5, 1000, 2**31, 2**32 - 1]))
        entries.append((tag, kind, count, rng.bytes(4)))
    orientation = int(rng.integers(0, 12))
    where = int(rng.integers(len(entries) + 1))
    entries.insert(where, (0x0112, 3, 1, struct.pack(order + "H", orientation)))
    block = exif_entries(entries, order)
    if rng.random() < 0.5:
        return block, orientation if 1 <= orientation <= 8 else 1
    return damaged(block, [block], rng), None


def with_exif(kind: str, block: bytes) -> bytes:
    """PICTURE as a JPEG, PNG, WEBP or AVIF with an EXIF block, whatever that is.

    The AVIF's header says orientation 6 instead of the EXIF block, as the format defines.
    """
    if kind != "AVIF":
        return encoded(PICTURE, kind, exif=block)
    long = Image.Exif()
    long[0x0112], long[0x010E] = 6, "x" * 4000
    content = encoded(PICTURE, kind, exif=long)
    payload = block.removeprefix(b"Exif\0\0")[:3000]
    at = content.index(b"MM\0*") if b"MM\0*" in content else content.index(b"II*\0")
    return content[:at] + payload + content[at + len(payload) :]


def png_chunk(kind: bytes, body: bytes, sound: bool = True) -> bytes:
    crc = zlib.crc32(kind + body) ^ (not sound)
    return struct.pack(">L", len(body)) + kind + body + struct.pack(">L", crc)


def with_png_chunk(content: bytes, chunk: bytes) -> bytes:
    """A chunk behind the header of a PNG."""
    return content[:33] + chunk + content[33:]


def damaged(content: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """A file cut off, with bytes changed, or with blocks moved, doubled or taken from others."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        size = len(data)
        if not size:
            break
        header = rng.random() < 0.6  # most faults of decoders are about what a header says
        at = int(rng.integers(min(size, 200) if header else size))
        length = int(rng.integers(1, 64))
        match int(rng.integers(8)):
            case 0:
                del data[at:]
            case 1:
                for _ in range(int(rng.choice([1, 1, 4, 32]))):
                    place = int(rng.integers(min(size, 200) if header else size))
                    data[place] ^= 1 << int(rng.integers(8))
            case 2:
                data[at] = int(rng.choice([0, 1, 127, 128, 255]))
            case 3:
                data[at : at + 4] = rng.choice([b"\0\0\0\0", b"\xff" * 4, b"\x7f\xff\xff\xff"])
            case 4:
                data[at : at + length] = rng.bytes(length)
            case 5:
                del data[at : at + length]
            case 6:
                data[at:at] = data[at : at + length]
            case 7:
                other = others[int(rng.integers(len(others)))]
                start = int(rng.integers(len(other))) if other else 0
                data[at : at + length] = other[start : start + length]
    return bytes(data)
