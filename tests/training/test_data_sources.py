# SPDX-License-Identifier: Apache-2.0
"""Sources: the same samples from every format, and one sentence for each fault."""

import io
import json
import os
import pickle
from typing import get_args, get_type_hints

import numpy as np
import pytest
from PIL import Image

from k3jax.images.pngs import write_png
from k3jax.scenes.scene import MIXES, scene_at
from k3jax.training.data.buckets import EnlargedWarning, bucket_index
from k3jax.training.data.open_source import files, open_source, with_kind
from k3jax.training.data.parquet import ParquetSource
from k3jax.training.train_config import DataConfig

from data_sources import KINDS, SHAPES, encoded, picture, small, write_data


PNG = encoded(picture(0, 64, 64))


@pytest.mark.parametrize("kind", KINDS[:3])
def test_every_format_gives_the_same_samples(kind, tmp_path):
    source = open_source(write_data(kind, tmp_path))
    assert len(source) == 13
    found = {}
    for number in range(13):
        sample = source[number]
        assert (sample.key, sample.caption) == (source.key(number), source.caption(number))
        with source.open(number) as file:
            assert Image.open(file).size == Image.open(io.BytesIO(sample.image)).size
        found[sample.image] = sample.caption
    expected = {encoded(picture(n, *SHAPES[n % 3])): f"caption {n % 11}" for n in range(13)}
    assert found == expected
    assert len({source.key(n) for n in range(13)}) == 13


@pytest.mark.parametrize("kind", KINDS[:3])
def test_the_format_is_recognised(kind, tmp_path):
    config = write_data(kind, tmp_path)
    names = {"caption_column": config.caption_column, "image_column": config.image_column}
    for path in {config.path, str(tmp_path)}:
        assert open_source(small("auto", path, **names)).fingerprint() == (
            open_source(config).fingerprint()
        )
    assert with_kind(small("auto")).kind == "folder"  # and without a path it is refused


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_data_set_of_k3jax_is_training_data(kind, tmp_path):
    """In the layout of `k3jax synthesize`; the captions are the column `prompt`."""
    import pyarrow as pa
    from pyarrow import parquet

    for name in ("data", "metadata"):
        (tmp_path / name).mkdir()
    (tmp_path / "manifest.json").write_text("{}")
    row = {"key": "000000000", "prompt": "a red circle"}
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "metadata" / "000000.parquet")
    shard = tmp_path / "data" / "000000"
    if kind == "folder":
        shard.mkdir()
        (shard / "000000000.png").write_bytes(PNG)
        record = json.dumps({"file_name": "000000000.png", **row})
        (shard / "metadata.jsonl").write_text(record)
    elif kind == "webdataset":
        write_tar(shard.with_suffix(".tar"), png=PNG, json=json.dumps(row).encode())
    else:
        table = pa.Table.from_pylist([{**row, "image": {"bytes": PNG, "path": None}}])
        parquet.write_table(table, shard.with_suffix(".parquet"))
    source = open_source(small("auto", tmp_path))
    assert [sample.caption for sample in (source[n] for n in range(len(source)))] == [row["prompt"]]
    assert source[0].image == PNG


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_can_be_sent_to_another_process_and_read_in_any_order(kind, tmp_path):
    config = write_data(kind, tmp_path)
    source = open_source(config)
    source[3]  # something is open now
    other = pickle.loads(pickle.dumps(source))
    for number in reversed(range(13)):
        a, b = source[number], other[number]
        assert (a.key, a.caption) == (b.key, b.caption)
        assert np.array_equal(a.image, b.image)
    assert other.fingerprint() == source.fingerprint() == open_source(config).fingerprint()
    with pytest.raises(IndexError):
        source[13]


def test_a_fingerprint_depends_on_captions_and_files(tmp_path):
    config = write_data("folder", tmp_path)
    before = open_source(config).fingerprint()
    (tmp_path / "a" / "001.txt").write_text("another")
    changed = open_source(config).fingerprint()
    (tmp_path / "a" / "001.png").write_bytes(PNG)
    assert len({before, changed, open_source(config).fingerprint()}) == 3


def rewritten(path, change) -> None:
    """Other bytes at the same length and, where the system's clock is coarse, another time."""
    before = os.stat(path)
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    assert os.stat(path).st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


@pytest.mark.parametrize("kind", KINDS[:3])
def test_an_edit_of_the_same_size_makes_other_data(kind, tmp_path):
    """Other pixels in as many bytes, in a file of their own or inside of a larger one."""
    config = write_data(kind, tmp_path)
    source = open_source(config)
    stamp, fingerprint = source.stamp(), source.fingerprint()
    path = sorted(p for p in tmp_path.rglob("*") if p.suffix in (".png", ".tar", ".parquet"))[0]
    start = path.read_bytes().index(b"IDAT") + 20

    def change(data):
        data[start] ^= 1

    rewritten(path, change)
    assert open_source(config).stamp() != stamp
    assert open_source(config).fingerprint() != fingerprint
    rewritten(path, change)  # and back: the time is another, the content is not
    assert open_source(config).stamp() != stamp
    assert open_source(config).fingerprint() == fingerprint


def test_a_copy_of_the_data_is_the_same_data(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_data("folder", tmp_path / name)
    sources = [open_source(small("folder", tmp_path / name)) for name in ("a", "b")]
    assert sources[0].fingerprint() == sources[1].fingerprint()


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_of_an_imagefolder(name, tmp_path):
    (tmp_path / "deep").mkdir()
    for image in ("a.png", "deep/b.png", "deep/c.PNG"):
        (tmp_path / image).write_bytes(PNG)
    rows = [("a.png", 'first, "quoted"'), ("deep/b.png", "dépôt"), ("deep/c.PNG", "third")]
    if name.endswith("jsonl"):
        lines = [json.dumps({"file_name": f, "text": c}, ensure_ascii=False) for f, c in rows]
    else:
        lines = ["file_name,text", *(f'{f},"{c.replace(chr(34), 2 * chr(34))}"' for f, c in rows)]
    (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    source = open_source(small("folder", tmp_path, caption_column="text"))
    assert [(source.key(n), source.caption(n)) for n in range(3)] == rows
    missing = "there is no 'caption'; there is file_name, text"
    with pytest.raises(ValueError, match=rf"{name}, line [12]: {missing}"):
        open_source(small("folder", tmp_path))
    (tmp_path / "deep" / "b.png").unlink()
    with pytest.raises(ValueError, match=r"names deep/b\.png"):
        open_source(small("folder", tmp_path, caption_column="text"))


COLUMNS = "file_name,caption\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (COLUMNS + "a.png,a dog, running\n", "line 2: there are 2 columns, but 3 values: put a"),
        (COLUMNS + '"a.png","x"\na.png,"one",two,\n', "line 3: there are 2 columns, but 4 values"),
        (COLUMNS + 'a.png,"he said "hi" there"\n', "line 2 is not CSV .* double the quotes inside"),
        (COLUMNS + 'a.png,"no end\nand so on\n', "line 2 is not CSV"),
        (COLUMNS + "a.png\n", "line 2: 'caption' must be a text, not None"),
        ("file_name;caption\na.png;a dog\n", "line 1: the columns are separated by ';'; they must"),
        ("file_name\tcaption\na.png\ta dog\n", r"line 1: .* separated by '\\t'; they must"),
        ((COLUMNS + "a.png,un dépôt\n").encode("latin-1"), "line 2 is not UTF-8: save it as UTF-8"),
        ((COLUMNS + "a.png,x\n").encode("utf-16"), "line 1 is not UTF-8: save it as UTF-8"),
        ((COLUMNS + "a.png,x\n").encode("utf-16-le"), "line 1 is not UTF-8: save it as UTF-8"),
    ],
)
def test_faults_of_csv(content, message, tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "metadata.csv").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    with pytest.raises(ValueError, match=rf"metadata\.csv, {message}") as error:
        open_source(small("folder", tmp_path))
    assert "\0" not in str(error.value)


def test_a_quote_inside_of_a_csv_text_and_any_line_ends_are_fine(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    for end in ("\n", "\r\n", "\r"):
        text = f'file_name,caption{end}a.png,a 5" disk{end}'
        (tmp_path / "metadata.csv").write_bytes(text.encode())
        assert open_source(small("folder", tmp_path)).caption(0) == 'a 5" disk'


def test_captions_that_are_not_utf8_are_named_alike_everywhere(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    latin, half = "un dépôt".encode("latin-1"), b'"\\ud83d"'
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(PNG)

    def refused(kind, path, message, **more):
        with pytest.raises(ValueError, match=message) as error:
            open_source(small(kind, path, **more))
        assert str(error.value).endswith(".") and "\n" not in str(error.value)

    for data in (latin, "x".encode("utf-16"), "x".encode("utf-16-le")):
        (tmp_path / "a" / "0.txt").write_bytes(data)
        refused("folder", tmp_path / "a", r"a/0\.txt is not UTF-8: save it as UTF-8")
        write_tar(tmp_path / "a.tar", png=PNG, txt=data)
        refused("webdataset", tmp_path / "a.tar", r"a\.tar: dir/x\.txt is not UTF-8: save it as")
    for data in (b'{"caption": "' + latin + b'"}', b'{"caption": ' + half + b"}"):
        write_tar(tmp_path / "a.tar", png=PNG, json=data)
        refused("webdataset", tmp_path / "a.tar", r"a\.tar: .* is not UTF-8: save it as UTF-8")
        (tmp_path / "a" / "metadata.jsonl").write_bytes(data[:-1] + b', "file_name": "0.png"}')
        refused("folder", tmp_path / "a", r"metadata\.jsonl, line 1.* is not UTF-8: save it as")
    texts = pa.array([b"x", latin], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"image": [PNG, PNG], "caption": texts}), tmp_path / "a.parquet")
    refused(
        "parquet", tmp_path / "a.parquet", r"a\.parquet: column 'caption' .* not UTF-8 \(in rows 0"
    )


def test_what_generate_writes_is_a_data_set(tmp_path):
    write_png(Image.new("RGB", (64, 64)), tmp_path / "0.png", {"call": {"prompt": "a cät"}})
    write_png(Image.new("RGB", (64, 64)), tmp_path / "contact_sheet.png")
    (tmp_path / ".hidden.png").write_bytes(PNG)
    source = open_source(small("folder", tmp_path))
    assert [(source.key(n), source.caption(n)) for n in range(len(source))] == [("0.png", "a cät")]


def test_a_folder_that_links_to_itself_is_walked_once(tmp_path):
    write_data("folder", tmp_path)
    (tmp_path / "a" / "again").symlink_to(tmp_path, target_is_directory=True)
    assert len(open_source(small("folder", tmp_path))) == 13


def test_faults_of_folders(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        open_source(small("folder", tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="holds no images"):
        open_source(small("folder", tmp_path))
    (tmp_path / "a.png").write_bytes(PNG)
    with pytest.raises(ValueError, match=r"a\.png has no caption: write it into a\.txt"):
        open_source(small("folder", tmp_path))
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"a\.png has no caption"):
        open_source(small("folder", tmp_path))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"')
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 1 is not JSON"):
        open_source(small("folder", tmp_path))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "caption": null}')
    with pytest.raises(ValueError, match=r"line 1: 'caption' must be a text, not None"):
        open_source(small("folder", tmp_path))
    (tmp_path / "metadata.csv").write_text("")
    with pytest.raises(ValueError, match=r"both metadata\.jsonl and metadata\.csv"):
        open_source(small("folder", tmp_path))


@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_an_unreadable_image_is_found_before_the_run(kind, tmp_path):
    config = write_data(kind, tmp_path)
    key = "a/003.png" if kind == "folder" else "00001/000000003"
    if kind == "folder":
        (tmp_path / key).write_bytes(b"no image")
    else:
        tar = tmp_path / "00001.tar"
        data = bytearray(tar.read_bytes())
        start = data.index(encoded(picture(3, *SHAPES[0])))
        data[start : start + 8] = b"no image"
        tar.write_bytes(data)
    with pytest.raises(ValueError, match=f"image {key} is not an image in a format"):
        bucket_index(open_source(config), config)


def write_tar(path, **members) -> None:
    from webdataset import TarWriter

    with TarWriter(str(path)) as writer:
        writer.write({"__key__": "dir/x.y".split(".")[0], **members})


def test_captions_of_webdatasets(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    fields = json.dumps({"prompt": "from json", "long": "longer"}).encode()
    write_tar(tmp_path / "one" / "0.tar", **{"mask.png": b"-", "JPG": PNG, "json": fields})
    write_tar(tmp_path / "two" / "0.tar", **{"png": PNG, "txt": b"from text", "json": fields})
    both = f"{tmp_path}/two/0.tar, {tmp_path}/one"  # a file and a folder
    source = open_source(small("webdataset", both))
    assert [source.key(n) for n in (0, 1)] == ["two/0/dir/x", "one/0/dir/x"]
    assert [source.caption(n) for n in (0, 1)] == ["from text", "from json"]
    assert source[1].image == PNG
    source = open_source(small("webdataset", both, caption_column="long"))
    assert [source.caption(n) for n in (0, 1)] == ["longer", "longer"]


def test_faults_of_webdatasets(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        open_source(small("webdataset", tmp_path / "*.tar"))
    path = tmp_path / "a.tar"
    write_tar(path, png=PNG, json=b'{"title": "x"}')
    with pytest.raises(ValueError, match=r"a\.tar: sample dir/x has no caption.* has title"):
        open_source(small("webdataset", path))
    write_tar(path, png=PNG, json=b"{")
    with pytest.raises(ValueError, match=r"x\.json is not JSON"):
        open_source(small("webdataset", path))
    write_tar(path, txt=b"only text")
    with pytest.raises(ValueError, match="the tars hold no images"):
        open_source(small("webdataset", path))
    write_tar(path, txt=b"text", png=PNG)
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(ValueError, match=r"a\.tar cannot be read as an uncompressed tar"):
        open_source(small("webdataset", path))
    path.write_bytes(b"\x1f\x8b not a tar")
    with pytest.raises(ValueError, match=r"a\.tar cannot be read as an uncompressed tar"):
        open_source(small("webdataset", path))


def test_parquet_reads_row_groups_and_keeps_few(tmp_path, monkeypatch):
    write_data("parquet", tmp_path)
    paths = files(str(tmp_path), ".parquet")
    source = ParquetSource(paths, "image", "text", kept_bytes=1)
    reads = []
    read = ParquetSource._read
    monkeypatch.setattr(ParquetSource, "_read", lambda s, g: reads.append(g) or read(s, g))
    for number in (0, 1, 0, 2, 0, 12):
        source[number]
    assert reads == [0, 1, 0, 6]
    reads.clear()
    source = ParquetSource(paths, "image", "text")
    for number in [*range(13), *range(13)]:
        source[number]
    assert reads == [0, 1, 2, 3, 4, 5, 6]


def test_faults_of_parquet(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "a.parquet"

    def write(**columns):
        parquet.write_table(pa.table(columns), path)
        return small("parquet", path)

    with pytest.raises(ValueError, match=r"no column 'caption'; there are image, text: set `cap"):
        open_source(write(image=[PNG], text=["x"]))
    with pytest.raises(ValueError, match=r"no column 'image'; there are jpg, caption: set `image_"):
        open_source(write(jpg=[PNG], caption=["x"]))
    with pytest.raises(ValueError, match=r"'image' must hold the bytes of images.* not string"):
        open_source(write(image=["a.png"], caption=["x"]))
    with pytest.raises(ValueError, match=r"row 1: 'caption' must be a text.* not None"):
        open_source(write(image=[PNG, PNG], caption=["x", None]))
    with pytest.raises(ValueError, match="have no rows"):
        open_source(write(image=pa.array([], pa.binary()), caption=pa.array([], pa.string())))
    config = write(
        image=[{"bytes": None, "path": "a.png"}, {"bytes": PNG, "path": None}], caption=["x", "y"]
    )
    with pytest.raises(ValueError, match="image a/00000000 has no bytes in column 'image'"):
        bucket_index(open_source(config), config)
    path.write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as Parquet"):
        open_source(small("parquet", path))


def test_faults_of_configs():
    with pytest.raises(ValueError, match="data of kind folder need a `path`"):
        open_source(small("folder"))
    with pytest.raises(ValueError, match="gs://bucket/x is not a local path"):
        open_source(small("webdataset", "gs://bucket/x"))


def test_sizes_are_read_once_where_there_is_a_cache(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    config = write_data("folder", tmp_path / "data")
    config = small("folder", config.path, cache=str(tmp_path / "cache"), resolution=128)
    with pytest.warns(EnlargedWarning, match=r"13 of 13 images .* smallest is .*\(120x60\)"):
        first = bucket_index(open_source(config), config)
    assert first.num_enlarged == 13
    (sizes,) = (tmp_path / "cache").iterdir()
    source = open_source(config)
    monkeypatch.setattr(type(source), "open", None)
    monkeypatch.setattr(type(source), "fingerprint", None)
    with pytest.warns(EnlargedWarning):
        again = bucket_index(source, config)
    np.testing.assert_array_equal(first.bucket_of, again.bucket_of)
    assert first.source_fingerprint == again.source_fingerprint != ""
    monkeypatch.undo()
    sizes.write_bytes(b"broken")
    with pytest.warns(EnlargedWarning):
        bucket_index(source, config)
    (tmp_path / "data" / "a" / "001.png").write_bytes(encoded(picture(0, 16, 16)))
    with pytest.warns(EnlargedWarning, match=r"\(16x16\)"):
        bucket_index(open_source(config), config)


@pytest.mark.parametrize("crop", [None, 32])
def test_scenes_of_places_are_other_data(crop):
    everything, places = (
        open_source(small("scenes", scene_mix=mix, crop=crop)) for mix in ("all", "places")
    )
    words = ("above", "over", "below", "under", "left", "right", "top", "bottom", "center")
    told = [
        [any(w in s[n].caption for w in words) for n in range(13)] for s in (everything, places)
    ]
    assert all(told[1]) and not all(told[0])
    assert everything.fingerprint() != places.fingerprint()


def test_every_mix_of_scenes_is_a_setting():
    assert get_args(get_type_hints(DataConfig)["scene_mix"]) == tuple(MIXES)
    told = {mix: [scene_at(0, n, mix=mix).kind for n in range(200)] for mix in MIXES}
    for mix, kinds in told.items():
        assert set(kinds) == set(MIXES[mix][0])
        for kind, share in MIXES[mix][0].items():
            assert abs(kinds.count(kind) / 200 - share) < 0.12
