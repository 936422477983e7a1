# SPDX-License-Identifier: Apache-2.0
"""Prompt files of every kind become the same samples, and every bad line is named."""

import csv
import gzip
import io
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from k3jax.synthesis import prompt_files, prompt_index
from k3jax.synthesis.prompt_index import PromptSource
from k3jax.synthesis.samples import COLUMNS, RowRules

from data_sets import write_jsonl


RULES = RowRules(0, 1, 1024, 512, 3.0, None, 64)
ROWS = [
    {"id": "a/b.c", "prompt": "a red circle", "seed": 7, "width": 64, "height": 128},
    {"prompt": "рыжий кот", "negative_prompt": "dull, grey", "guidance_scale": 0},
    {"id": "3", "prompt": 'say "hi", twice', "negative_prompt": "line\nbreak"},
]


def write(folder, kind):
    """ROWS as a file of that kind."""
    path = folder / f"prompts.{kind}"
    format = kind.removesuffix(".gz").removeprefix("semicolon.")
    columns = dict.fromkeys(["note", *(column for row in ROWS for column in row)])
    rows = [{**columns, **row} for row in ROWS]
    if format == "jsonl":
        write_jsonl(path, ROWS)
    elif format == "json":
        path.write_text("\ufeff" + json.dumps(rows, indent=1))
    elif format == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    else:
        delimiter = "\t" if format == "tsv" else ";" if kind.startswith("semicolon") else ","
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(columns), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    if kind.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


def rows_of(paths, rules=RULES, **options):
    source = PromptSource([str(path) for path in paths], rules, **options)
    index = source.scan()
    return list(index.read(0, index.rows)), index


LINES = {"jsonl": 2, "jsonl.gz": 2, "parquet": 2, "json": 12}
"""Format -> line of the second row, where that is not 3."""


@pytest.mark.parametrize(
    "kind", ["jsonl", "csv", "parquet", "tsv", "json", "semicolon.csv", "csv.gz", "jsonl.gz"]
)
def test_columns(tmp_path, kind):
    rows, index = rows_of([write(tmp_path, kind)])
    assert [row.id for row in rows] == ["a/b.c", f"{LINES.get(kind, 3):09d}", "3"]
    assert [row.prompt for row in rows] == [row["prompt"] for row in ROWS]
    assert [row.negative_prompt for row in rows] == [None, "dull, grey", "line\nbreak"]
    assert [row.seed for row in rows] == [7, None, None]
    assert [(row.width, row.height) for row in rows] == [(64, 128), (1024, 512), (1024, 512)]
    assert [row.guidance_scale for row in rows] == [3.0, 0.0, 3.0]
    summary = index.summary
    assert summary.faults == 0 and summary.sizes == [[64, 128, 1], [1024, 512, 2]]
    assert summary.unused == ([] if kind.startswith("jsonl") else ["note"])


def test_text(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffa red circle\r\n\n  \n  рыжий кот  ".encode())
    rows, index = rows_of([tmp_path / "p.txt"])
    assert [(row.id, row.prompt) for row in rows] == [
        ("000000001", "a red circle"),
        ("000000004", "рыжий кот"),
    ]
    assert index.rows == 2


def test_several_files(tmp_path):
    """A pattern in the order of names, then another kind of file; numbers go through."""
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(f"{name} one\n{name} two\n")
    last = write_jsonl(tmp_path / "z.jsonl", [{"prompt": "z"}])
    rows, _ = rows_of([tmp_path / "*.txt", last])
    assert [row.prompt for row in rows] == ["a one", "a two", "b one", "b two", "z"]
    assert rows[3].id == "0001-000000002" and rows[4].id == "0002-000000001"
    with pytest.raises(ValueError, match=r"no file matches .*\.csv"):
        rows_of([tmp_path / "*.csv"])


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
def test_any_row_is_read_where_it_stands(tmp_path, monkeypatch, kind):
    """Rows from the middle on are those of a whole reading, also across files, without it."""
    monkeypatch.setattr(prompt_index, "GROUP", 4)
    paths = []
    for number in range(2):
        prompts = [f"{number} {k}" + " x" * (k % 7) for k in range(23)]
        paths.append(tmp_path / f"{number}.{kind}")
        if kind == "txt":
            paths[-1].write_text("\n\n".join(prompts))
        elif kind == "jsonl":
            write_jsonl(paths[-1], [{"prompt": p} for p in prompts])
        elif kind == "csv":
            lines = [f'"{p}{chr(10) if k % 3 else ""}"' for k, p in enumerate(prompts)]
            paths[-1].write_text("prompt\n" + "\n".join(lines))
        else:
            pq.write_table(pa.table({"prompt": prompts}), paths[-1], row_group_size=6)
    source = PromptSource([str(p) for p in paths], RULES)
    index = source.scan()
    everything = list(index.read(0, 46))
    assert [row.index for row in everything] == list(range(46))
    for start in range(46):
        for stop in (start, start + 1, min(46, start + 9), 46):
            assert list(index.read(start, stop)) == everything[start:stop]


def test_other_names(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"caption": "a", "image": "x.png", "url": "u"}])
    (row,), index = rows_of([path], columns={"prompt": "caption", "id": "url", "image": ""})
    assert (row.id, row.prompt) == ("u", "a") and index.summary.unused == ["image"]
    with pytest.raises(ValueError, match=r"--column promt: known are id, prompt"):
        rows_of([path], columns={"promt": "caption"})


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"prompt": "a"', "not JSON (Expecting ',' delimiter at column 15)"),
        ("[1]", "is not a JSON object but '[1]'"),
        ("[" * 100_000, "not JSON"),
        ('{"text": "a"}', "has no 'prompt' (it has: text)"),
        ('{"prompt": ""}', "has no prompt"),
        ('{"prompt": 3}', "has the prompt 3; it must be a string"),
        ('{"prompt": "a\\u0007"}', "has a prompt that has the control character U+0007"),
        ('{"prompt": "\\ud800"}', "has a prompt that has the control character U+D800"),
        (json.dumps({"prompt": "a" * 100_001}), "has a prompt of 100,001 characters"),
        ('{"prompt": "a", "seed": -1}', "has the seed -1; it must be between 0 and 2^63 - 1"),
        ('{"prompt": "a", "seed": 1.5}', "has the seed 1.5, which is not a whole number"),
        ('{"prompt": "a", "seed": true}', "has the seed True, which is not a whole number"),
        ('{"prompt": "a", "width": 64}', "has a width but no height"),
        ('{"prompt": "a", "width": 100, "height": 64}', "has the width 100; it must be a positive"),
        ('{"prompt": "a", "width": 0, "height": 64}', "the width 0; it must be a positive multi"),
        ('{"prompt": "a", "guidance_scale": -1}', "the guidance_scale -1; it must be 0 or more"),
        ('{"prompt": "a", "guidance_scale": NaN}', "the guidance_scale nan; it must be 0 or more"),
        ('{"prompt": "a", "guidance_scale": "x"}', "guidance_scale 'x', which is not a number"),
        (json.dumps({"prompt": "a", "id": "i" * 1001}), "has an id of 1001 characters"),
        ('{"prompt": "a", "id": "bad:1"}', "has an id that starts with 'bad:'"),
        ('{"prompt": "a", "id": "one"}', "has the id 'one' of p.jsonl, line 1"),
        ('{"prompt": "a", "id": 1.5}', "has the id 1.5; it must be a string"),
        (b'{"prompt": "\xe4"}', "byte 13 is not UTF-8 (Latin-1 or Windows-1252?)"),
    ],
)
def test_a_bad_line_is_named(tmp_path, refuses, stubs, line, reason):
    line = line if isinstance(line, bytes) else line.encode()
    good = b'{"prompt": "a", "id": "one"}\n\n'
    path = tmp_path / "p.jsonl"
    path.write_bytes(good + line + b"\n" + good.replace(b"one", b"two"))
    message = refuses("synthesize", path, tmp_path / "out")
    assert message.startswith("p.jsonl, line 3: ") and reason in message
    assert "--skip-bad" in message
    assert not (tmp_path / "out").exists() and not stubs


@pytest.mark.parametrize(
    "content, reason",
    [
        ("prompt,seed\na,1,2\n", "line 2: has 3 cells under 2 columns"),
        ('prompt,seed\n"a,1\n', "line 2: not CSV (unexpected end of data)"),
        ("text\na\n", "has no column 'prompt' (it has: text): name the column of the prompts"),
        ("", "p.csv is empty"),
        ("prompt\n", "p.csv holds no prompts"),
        ("prompt,negative_promt\na,b\n", "if 'negative_prompt' is meant, use --column neg"),
        ("prompt,mask\na,b\n", "line 2: has a mask but no image"),
    ],
)
def test_a_bad_table_is_refused(tmp_path, refuses, content, reason):
    (tmp_path / "p.csv").write_text(content)
    assert reason in refuses("synthesize", tmp_path / "p.csv", tmp_path / "out")


def test_many_bad_lines(tmp_path, refuses):
    (tmp_path / "p.jsonl").write_text("{\n" * 100)
    message = refuses("synthesize", tmp_path / "p.jsonl", tmp_path / "out")
    assert message.count("not JSON") == 5 and "and 95 more bad lines" in message


def test_a_line_without_end(tmp_path, monkeypatch):
    """It is one bad line, and is not held in memory."""
    monkeypatch.setattr(prompt_files, "MAX_LINE", 1000)
    (tmp_path / "p.txt").write_text("a\n" + "b" * 5000 + "\nc\n")
    rows, index = rows_of([tmp_path / "p.txt"])
    assert index.rows == 3 and index.summary.faults == 1 and "is longer than" in rows[1].fault
    assert rows[2].prompt == "c" and rows[2].id == "000000003"


@pytest.mark.parametrize(
    "name, reason",
    [
        ("none.txt", "none.txt does not exist"),
        ("p.docx", "p.docx has none of the endings .txt, .jsonl, .json, .csv, .tsv, .p"),
        ("bad.parquet", "bad.parquet cannot be read as Parquet"),
        ("", " cannot be read: Is a directory"),
        ("utf16.csv", "utf16.csv is UTF-16 text: convert it with `iconv -f UTF-16 -t UTF-8`"),
        ("utf16le.txt", "utf16le.txt is no UTF-8 text but UTF-16 without a mark"),
        ("latin1.csv", "latin1.csv, line 2: byte 4 is not UTF-8 (Latin-1 or Windows-1252?)"),
        ("latin1.txt", "latin1.txt, line 1: byte 4 is not UTF-8 (Latin-1 or Windows-1252?)"),
        ("latin1.json", "latin1.json, line 2: byte 16 is not UTF-8"),
        ("table.csv", "table.csv is a Parquet file: give it the ending .parquet"),
        ("excel.csv", "excel.csv is a zip archive or an Excel file"),
        ("pointer.jsonl", "pointer.jsonl is a git-lfs pointer"),
        ("half.txt.gz", "half.txt.gz cannot be read: Compressed file ended"),
        ("bad.json", "bad.json, line 3: not a JSON array (Expecting ',')"),
        ("open.json", "open.json, line 2: not a JSON array (Expecting ',')"),
        ("two.csv", "two.csv has two columns of the same name (prompt, prompt)"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, refuses, name, reason):
    (tmp_path / "p.docx").write_text("a")
    (tmp_path / "bad.parquet").write_text("a")
    for file, content in BAD_FILES.items():
        (tmp_path / file).write_bytes(content)
    options = [] if name else ["--prompts-format", "txt"]
    message = refuses("synthesize", tmp_path / name, tmp_path / "out", *options)
    assert reason in message and message.isprintable()


TEXT_ROWS = st.lists(st.text(max_size=20), max_size=4)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=3,
)
OBJECTS = st.lists(st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=4), max_size=4)


def table(rows, delimiter):
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter, escapechar="\\").writerows(rows)
    return file.getvalue().encode(errors="surrogatepass")


def parquet(columns):
    file = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["a", "b", "c"]} | columns), file)
    return file.getvalue()


@pytest.mark.parametrize("kind", prompt_files.FORMATS)
@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_file_gives_prompts_or_one_sentence(tmp_path, kind, data):
    """Any bytes, any text, any values of the columns: rows that are whole, or the file named."""
    texts = st.text(max_size=60).map(lambda text: text.encode(errors="surrogatepass"))
    choices = [st.binary(max_size=60), texts, texts.map(gzip.compress)]
    if kind in ("csv", "tsv"):
        rows = st.lists(TEXT_ROWS, max_size=4).map(lambda rows: [["prompt", "seed"], *rows])
        choices.append(rows.map(lambda rows: table(rows, "\t" if kind == "tsv" else ",")))
    elif kind == "json":
        choices.append(OBJECTS.map(lambda rows: json.dumps(rows).encode()))
    elif kind == "jsonl":
        choices.append(OBJECTS.map(lambda rows: "\n".join(map(json.dumps, rows)).encode()))
    elif kind == "parquet":
        cells = [st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(max_size=9), st.binary()]
        columns = st.one_of([st.lists(cell, min_size=3, max_size=3) for cell in cells])
        choices.append(st.dictionaries(st.sampled_from(COLUMNS), columns).map(parquet))
    path = tmp_path / f"any.{kind}"
    path.write_bytes(data.draw(st.one_of(choices)))
    try:
        rows, index = rows_of([path])
    except ValueError as error:
        message = str(error)
        assert "any." in message or "--column" in message, message
        assert message.isprintable() and len(message) < 700
        return
    assert index.summary.faults == sum(row.fault is not None for row in rows)
    for row in rows:
        if row.fault is None:
            assert row.prompt and row.width > 0 and row.guidance_scale >= 0
        else:
            assert row.fault.startswith(f"any.{kind}, line {row.line}: ")
            assert row.fault.isprintable() and len(row.fault) < 700


BAD_FILES = {
    "utf16.csv": "prompt\na cat\n".encode("utf-16"),
    "utf16le.txt": "a cat\na dog\n".encode("utf-16-le"),
    "latin1.csv": "prompt\ncaf\xe9\n".encode("latin-1"),
    "latin1.txt": "caf\xe9\n".encode("latin-1"),
    "latin1.json": '[{"prompt": "a"},\n{"prompt": "caf\xe9"}]'.encode("latin-1"),
    "table.csv": b"PAR1 and so on",
    "excel.csv": b"PK\x03\x04 and so on",
    "pointer.jsonl": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "half.txt.gz": gzip.compress(b"a cat\n" * 99)[:-12],
    "bad.json": b'[{"prompt": "a"}\n,\n{"prompt": "b"} {"prompt": "c"}]',
    "open.json": b'[{"prompt": "a"},\n{"prompt": "b"}',
    "two.csv": b"prompt,prompt\na,b\n",
}


def test_standard_input(tmp_path, made, refuses, monkeypatch, stubs):
    """It is kept, and the same command with the same input goes on."""

    def pipe(text):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    pipe("one\ntwo\n")
    made("synthesize", "-", tmp_path / "out", "--size", "64x64")
    assert (tmp_path / "out" / "prompts.txt").read_text() == "one\ntwo\n"
    (tmp_path / "out" / "metadata" / "000000.parquet").unlink()
    pipe("one\ntwo\n")
    made("synthesize", "-", tmp_path / "out", "--size", "64x64")
    (tmp_path / "out" / "metadata" / "000000.parquet").unlink()
    made("verify", tmp_path / "out", "--repair")  # from the copy
    pipe("one\nthree\n")
    message = refuses("synthesize", "-", tmp_path / "out", "--size", "64x64")
    assert "standard input differs from" in message
    share = ["--job", "0", "--jobs", "2"]
    assert "by one process" in refuses("synthesize", "-", tmp_path / "new", *share)


def test_a_data_set_of_hugging_face(tmp_path, made, stubs):
    """As `datasets` saves it, and as it loads it by name and split."""
    import datasets

    data = datasets.Dataset.from_list([{"text": "a cat"}, {"text": "a dog"}])
    data.save_to_disk(tmp_path / "saved")
    (tmp_path / "named").mkdir()
    data.to_json(tmp_path / "named" / "train.jsonl")
    found = []
    for number, name in enumerate((f"{tmp_path}/saved", f"{tmp_path}/named:train")):
        out = tmp_path / f"out{number}"
        made("synthesize", f"hf:{name}", out, "--column", "prompt=text", "--size", "64x64")
        rows = pq.read_table(out / "metadata" / "000000.parquet").to_pylist()
        found.append([(row["id"], row["prompt"], row["sha256"]) for row in rows])
    assert found[0] == found[1] and found[0][1][1] == "a dog"


def test_a_bucket(tmp_path, made, stubs):
    """Prompts from an address and a data set at one, in fsspec's memory."""
    import fsspec

    files = fsspec.filesystem("memory")
    for number in range(2):
        files.pipe_file(f"/in/{number}.txt", b"one\ntwo\n")
    words = ["synthesize", "memory://in/*.txt", "memory://out/set", "--size", "64x64"]
    words += ["--samples-per-shard", "3"]
    made(*words)
    assert files.exists("/out/set/data/000001.tar") and files.exists("/out/set/manifest.json")
    files.rm_file("/out/set/metadata/000001.parquet")
    out, _ = made(*words)
    assert out == ["data/000001.tar: 1 images"]
    assert "as they should be" in made("verify", "memory://out/set")[0][-1]
    made("gallery", "memory://out/set")
    assert files.exists("/out/set/gallery.html")
    files.pipe_file("/out/set/data/000000.tar", files.cat_file("/out/set/data/000000.tar")[:-2000])
    assert made("verify", "memory://out/set", "--repair")[0][0] == "making 1 shards again: 0"
    for kind in ("parquet", "files"):
        made("synthesize", "memory://in/*.txt", f"memory://out/{kind}", "--format", kind)
        made("verify", f"memory://out/{kind}")
