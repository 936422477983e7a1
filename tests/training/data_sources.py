# SPDX-License-Identifier: Apache-2.0
"""The same small data set in every format, for tests of training data."""

import io
import json

import numpy as np
from PIL import Image

from k3jax.training.train_config import DataConfig


KINDS = ("folder", "webdataset", "parquet", "scenes")
SHAPES = [(96, 96), (60, 120), (120, 64)]  # (height, width), in turns


def picture(number: int, height: int, width: int) -> np.ndarray:
    """Random pixels, others for each number."""
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    """An image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def small(kind: str, path=None, **more) -> DataConfig:
    """A config with images of 64 pixels."""
    more = {"num_scenes": 13, "resolution": 64, **more}
    return DataConfig(kind=kind, path=None if path is None else str(path), **more)


def write_data(kind: str, folder, count: int = 13) -> DataConfig:
    """A data set of `count` pictures in three shapes; several files where the kind has files."""
    rows = []
    for n in range(count):
        pixels = picture(n, *SHAPES[n % len(SHAPES)])
        rows.append((encoded(pixels), f"caption {n % (count - 2)}"))
    if kind == "scenes":
        return small(kind, num_scenes=count)
    if kind == "folder":
        write_folder(folder, rows)
        return small(kind, folder)
    if kind == "webdataset":
        write_tars(folder, rows)
        return small(kind, folder / "*.tar")
    write_parquet(folder / "a.parquet", rows[: count // 2])
    write_parquet(folder / "b.parquet", rows[count // 2 :])
    return small(kind, folder, image_column="image", caption_column="text")


def write_folder(folder, rows) -> None:
    """Text files beside images, in two folders."""
    for n, (image, caption) in enumerate(rows):
        stem = folder / ("a" if n % 2 else "b") / f"{n:03d}"
        stem.parent.mkdir(exist_ok=True)
        stem.with_suffix(".png").write_bytes(image)
        stem.with_suffix(".txt").write_text(caption)


def write_tars(folder, rows) -> None:
    """Two tars by the webdataset package itself, one with text and one with JSON."""
    from webdataset import TarWriter

    for tar in (0, 1):
        with TarWriter(str(folder / f"{tar:05d}.tar")) as writer:
            for n, (image, caption) in list(enumerate(rows))[tar::2]:
                text = {"json": json.dumps({"prompt": caption}).encode()} if tar else {}
                text = text or {"txt": caption.encode()}
                writer.write({"__key__": f"{n:09d}", "png": image, **text})


def write_parquet(path, rows, row_group_size: int = 2) -> None:
    """As Hugging Face datasets write it: a struct of bytes and a path, in several row groups."""
    import pyarrow as pa
    from pyarrow import parquet

    images = [{"bytes": image, "path": f"{n}.png"} for n, (image, _) in enumerate(rows)]
    table = pa.table({"image": images, "text": [caption for _, caption in rows]})
    parquet.write_table(table, path, row_group_size=row_group_size)


def take(loader, count: int) -> list[dict]:
    """The next batches."""
    return [next(loader) for _ in range(count)]


def assert_same(found: list[dict], expected: list[dict]) -> None:
    """Batches are equal bit for bit."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if isinstance(a[name], list):
                assert a[name] == b[name]
            else:
                assert a[name].dtype == b[name].dtype
                np.testing.assert_array_equal(a[name], b[name])
