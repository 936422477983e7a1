# SPDX-License-Identifier: Apache-2.0
"""`k3jax verify` finds every kind of damage, names it, and --repair mends it bit for bit."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_sets import contents, write_jsonl


SHARDS = 4


@pytest.fixture(params=["webdataset", "parquet", "files"])
def data_set(request, tmp_path, made, stubs):
    """(folder, its contents): twelve samples in four shards, one of them failed."""
    rows = [{"id": f"n{k}", "prompt": f"number {k}"} for k in range(11)]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [*rows, {"id": "n11", "prompt": "nan"}])
    out = tmp_path / "out"
    words = ["--size", "64x64", "--samples-per-shard", "3", "--format", request.param]
    made("synthesize", prompts, out, *words)
    return out, contents(out)


def shard_file(out, shard):
    """A file of a shard's data."""
    path = next(out.glob(f"data/{shard:06d}*"))
    return sorted(path.iterdir())[0] if path.is_dir() else path


def test_all_is_well(data_set, made):
    lines = made("verify", data_set[0])[0]
    assert "11 images, 1 failed samples, of 12; 4 of 4 shards finished" in lines[0]
    assert lines[1] == "  failed: 1 x 1 of the image's 12288 values are not finite"
    assert lines[2] == "  All checksums and images are as they should be."
    assert made("verify", data_set[0], "--quick")[0][2].startswith("  All checksums are")
    values = json.loads("\n".join(made("verify", data_set[0], "--json")[0]))
    assert values["good"] and values["images"] == 11 and values["remake"] == []


def flip(path, part=2):
    content = bytearray(path.read_bytes())
    content[len(content) // part] ^= 1
    path.write_bytes(content)


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def sidecar_of(out, shard):
    return out / "metadata" / f"{shard:06d}.parquet"


DAMAGE = {
    "flipped": (lambda out: flip(shard_file(out, 1)), "has other bytes than when it was written"),
    "truncated": (lambda out: halve(shard_file(out, 1)), "has other bytes than when"),
    "missing data": (lambda out: shard_file(out, 1).unlink(), "data/000001"),
    "missing sidecar": (lambda out: sidecar_of(out, 1).unlink(), "missing: shards 1"),
    # In the rows; the end of the file describes them.
    "flipped sidecar": (lambda out: flip(sidecar_of(out, 1), 8), "000001.parquet is damaged"),
    "truncated sidecar": (lambda out: halve(sidecar_of(out, 1)), "000001.parquet is damaged"),
    "swapped sidecar": (
        lambda out: sidecar_of(out, 1).write_bytes(sidecar_of(out, 2).read_bytes()),
        "metadata/000001.parquet is that of shard 2",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_repaired(data_set, run, made, damage):
    out, before = data_set
    harm, sentence = DAMAGE[damage]
    harm(out)
    code, lines, _ = run("verify", out)
    text = "\n".join(lines)
    assert code == 1 and sentence in text
    assert f"To be made again: shards 1 (k3jax verify {out} --repair)" in text
    assert json.loads("\n".join(run("verify", out, "--json")[1]))["remake"] == [1]
    lines = made("verify", out, "--repair")[0]
    assert lines[0] == "making 1 shards again: 1" and "as they should be" in lines[-1]
    assert contents(out) == before


def resigned(out, shard, edit):
    """Rewrites a sidecar, and the shard's checksum in it, as nobody but an attacker would."""
    path = sidecar_of(out, shard)
    table = pq.read_table(path)
    rows = table.to_pylist()
    edit(rows)
    again = pa.Table.from_pylist(rows, table.schema)
    pq.write_table(again, path)


@pytest.mark.parametrize(
    "edit, sentence",
    [
        (lambda rows: rows.pop(), "has not one row for each of its samples"),
        (lambda rows: rows[0].update(sha256="0" * 64), "n3 have other bytes than their sha256"),
        (lambda rows: rows[0].update(width=128), "n3 cannot be read as images of their size"),
        (lambda rows: rows[1].update(key="other"), "n4 are missing"),
        (lambda rows: rows[1].update(status="failed"), "n4 are doubled or unknown"),
        (lambda rows: rows[1].update(id="n0"), "twice: n0 in shards 0-1"),
    ],
)
def test_inconsistencies(data_set, run, edit, sentence):
    out, _ = data_set
    resigned(out, 1, edit)
    code, lines, _ = run("verify", out)
    assert code == 1 and sentence in "\n".join(lines), lines


def test_files_that_belong_to_nothing(data_set, run):
    out, _ = data_set
    (out / "data" / "000009.tar").touch()
    (out / "metadata" / "notes.txt").touch()
    code, lines, _ = run("verify", out)
    assert code == 1
    assert "  unknown: data/000009.tar belongs to nothing; remove it" in lines
    assert "  unknown: metadata/notes.txt belongs to nothing; remove it" in lines


def test_an_image_twice_in_a_tar(tmp_path, made, run, stubs):
    (tmp_path / "p.txt").write_text("a\nb\n")
    made("synthesize", tmp_path / "p.txt", tmp_path / "out", "--size", "64x64")
    path = tmp_path / "out" / "data" / "000000.tar"
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo("000000001.jpg")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    code, lines, _ = run("verify", tmp_path / "out")
    assert code == 1 and "000000001 are doubled or unknown" in "\n".join(lines)


def test_repair_without_the_prompts(tmp_path, made, refuses, stubs):
    """From sidecars where they are whole; else the prompts are asked for, or found elsewhere."""
    prompts = tmp_path / "p.txt"
    prompts.write_text("a\nb\nc\n")
    out = tmp_path / "out"
    made("synthesize", prompts, out, "--size", "64x64", "--samples-per-shard", "1")
    before = contents(out)
    moved = prompts.rename(tmp_path / "q.txt")
    (out / "data" / "000001.tar").unlink()
    made("verify", out, "--repair")
    assert contents(out) == before
    (out / "metadata" / "000001.parquet").unlink()
    assert "p.txt does not exist" in refuses("verify", out, "--repair")
    moved.write_text("a\nx\nc\n")
    message = refuses("verify", out, "--repair", "--prompts", moved)
    assert "the prompts are no longer those of the data set" in message
    moved.write_text("a\nb\nc\n")
    made("verify", out, "--repair", "--prompts", moved)
    assert contents(out) == before


def test_failed_samples_can_be_tried_again(tmp_path, made, stubs, monkeypatch):
    """An accident is mended; a bad line stays what it is."""
    from k3jax.synthesis.image_formats import ImageFormat

    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a"}\n{\n{"prompt": "b"}\n')
    out = tmp_path / "out"
    real, calls = ImageFormat.encode, []

    def encode(self, pixels):
        calls.append(1)
        if len(calls) == 1:
            raise OSError("encoder error -2")
        return real(self, pixels)

    monkeypatch.setattr(ImageFormat, "encode", encode)
    made("synthesize", prompts, out, "--size", "64x64", "--skip-bad")
    lines = made("verify", out)[0]
    assert "1 images, 2 failed samples" in lines[0]
    assert made("verify", out, "--repair")[0] == lines
    lines = made("verify", out, "--repair", "--retry-failed")[0]
    assert "2 images, 1 failed samples, of 3" in lines[2]
    assert "p.jsonl, line 2: not JSON" in lines[3]


def test_repair_with_other_weights_or_versions(tmp_path, made, refuses, stubs, monkeypatch):
    (tmp_path / "p.txt").write_text("a\n")
    out = tmp_path / "out"
    made("synthesize", tmp_path / "p.txt", out, "--size", "64x64")
    (out / "data" / "000000.tar").unlink()
    message = refuses("verify", out, "--repair", "--checkpoint", tmp_path / "none")
    assert "with --checkpoint DIR" in message
    monkeypatch.setattr("k3jax.synthesis.regeneration.versions", lambda: {"jax": "0.0.1"})
    assert "made with other versions" in refuses("verify", out, "--repair")
