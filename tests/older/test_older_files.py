# SPDX-License-Identifier: Apache-2.0
"""Files that k3jax 0.1.0 of 2026-11-29 wrote are read by the code of today.

make.py says what they are. They are never made again: where a test fails, people's files of then
cannot be read any more. Commands and names of `k3jax` are used where there are some.
"""

import hashlib
import importlib.metadata
import json
import tarfile
from pathlib import Path

import numpy as np
import PIL.features
import pyarrow.parquet as pq
import pytest
from PIL import Image

from k3jax import Kandinsky3Pipeline
from k3jax.checkpoints.format import read_checkpoint
from k3jax.checkpoints.lora_files import load_lora
from k3jax.checkpoints.restore import iterate_leaves
from k3jax.cli.main import main
from k3jax.config import to_dict
from k3jax.images.pngs import read_settings


HERE = Path(__file__).parent
EXPECTED = json.loads((HERE / "expected.json").read_text())
SYNTHESIZE = [
    *("--size", "64x64", "--dtype", "float32", "--seed", "11", "--samples-per-shard", "2"),
    *("--image-format", "png", "--job", "0", "--jobs", "1"),
]

pytestmark = pytest.mark.usefixtures("one_device")


def unpack(folder: Path, *names: str) -> Path:
    for name in names:
        with tarfile.open(HERE / f"{name}.tar.xz") as archive:
            archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the checkpoints, where the commands run; the user's cache is in it."""
    unpack(tmp_path, "checkpoints")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def run(here, capsys):
    """A command that must go well; (stdout, stderr)."""

    def call(*words, code=0):
        capsys.readouterr()
        found = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert found == code, (out, err)
        return out, err

    return call


def digest(array) -> str:
    array = np.ascontiguousarray(array)
    head = f"{array.dtype.name} {array.shape}\n".encode()
    return hashlib.sha256(head + array.tobytes()).hexdigest()


def digest_of_all(arrays) -> str:
    text = "".join(f"{name} {digest(array)}\n" for name, array in sorted(arrays))
    return hashlib.sha256(text.encode()).hexdigest()


def lora_arrays(path) -> dict[str, np.ndarray]:
    weights = load_lora(path).weights
    return {f"{name}.{key}": x for name, pair in weights.items() for key, x in pair.items()}


def assert_is(path, expected) -> None:
    """A checkpoint with every array as it was written."""
    checkpoint = read_checkpoint(path)
    assert checkpoint.fingerprint == expected["fingerprint"]
    for name in expected["parts"]:
        assert digest_of_all(iterate_leaves(checkpoint, name)) == expected["components"][name], name


def pixels(image) -> np.ndarray:
    return np.asarray(
        (image if isinstance(image, Image.Image) else Image.open(image)).convert("RGB")
    )


def assert_same_pixels(found, expected) -> None:
    """Other processors round the last bits of a float otherwise: a few pixels may differ by 1."""
    difference = np.abs(np.asarray(found, int) - np.asarray(expected, int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.02


def change(path, edit) -> None:
    """Changes the content of a JSON file."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


# Checkpoints, LoRAs and images.


@pytest.mark.parametrize("name", ["base", "sharing"])
def test_checkpoint(here, run, name):
    described = json.loads(run("info", name, "--verify", "--json")[0])
    expected = EXPECTED["checkpoints"][name]
    assert described["faults"] == []
    assert described["fingerprint"] == expected["fingerprint"]
    own = [part for part, entry in described["components"].items() if not entry["shared"]]
    assert sorted(own) == expected["parts"]
    assert_is(name, expected)


def test_settings_of_a_checkpoint_that_came_later(here):
    complete = read_checkpoint("base").config

    def remove(content):
        for part, names in {
            "text_encoder": ("layer_norm_epsilon", "relative_attention_max_distance"),
            "text_projection": ("null_embedding",),
            "unet": ("expansion_ratio", "compression_ratio", "out_channels"),
            "movq": ("num_vq_embeddings", "vq_embed_dim"),
            "sampler": ("set_alpha_to_one", "sample_max_value", "variance_type", "eta"),
        }.items():
            for name in names:
                del content[part][name]

    change(here / "base" / "config.json", remove)
    assert read_checkpoint("base").config == complete


def test_lora(here):
    assert digest_of_all(lora_arrays("lora").items()) == EXPECTED["checkpoints"]["lora"]
    lora = load_lora("lora")
    assert (lora.config.rank, lora.config.alpha, lora.config.targets) == (2, 4.0, ("to_q",))
    assert lora.base_fingerprint == EXPECTED["checkpoints"]["base"]["fingerprint"]


@pytest.mark.parametrize("name", ["base", pytest.param("sharing", marks=pytest.mark.slow)])
def test_images(here, name):
    """The settings in a PNG make the same image again, also by the checkpoint that shares parts."""
    unpack(here, "generated")
    settings = read_settings("a.png")
    assert settings["checkpoint"]["fingerprint"] == EXPECTED["checkpoints"]["base"]["fingerprint"]
    assert settings["dtype"] == "float32" and settings["sampler"]["threshold_percentile"] == 0.97
    assert settings["call"]["prompt"] == "a red circle" and settings["call"]["seed"] == 3
    pipe = Kandinsky3Pipeline.from_pretrained(name, dtype=settings["dtype"])
    (image,) = pipe(**settings["call"], progress_bar=False).images
    assert_same_pixels(pixels(image)[4::8, 4::8], EXPECTED["generated"][name])
    if name == "base":
        assert_same_pixels(pixels(image), pixels("a.png"))


@pytest.mark.slow
def test_an_image_with_the_lora(here):
    unpack(here, "generated")
    pipe = Kandinsky3Pipeline.from_pretrained("base", dtype="float32")
    pipe.load_lora("lora")
    (image,) = pipe(**read_settings("a.png")["call"], progress_bar=False).images
    assert_same_pixels(pixels(image)[4::8, 4::8], EXPECTED["generated"]["lora"])


@pytest.mark.slow
def test_the_map_of_previews_is_taken_from_the_cache(here):
    unpack(here, "generated")
    (file,) = (here / "cache" / "k3jax" / "previews").iterdir()
    assert json.loads(file.read_text()) == EXPECTED["generated"]["preview_map"]
    change(file, lambda content: content[-1].__setitem__(0, 0.125))  # no other map is like this
    pipe = Kandinsky3Pipeline.from_pretrained("base", dtype="float32")
    seen = []
    pipe("a red circle", num_inference_steps=2, callback=seen.append, progress_bar=False)
    expected = np.array(EXPECTED["generated"]["preview_map"], np.float32)
    expected[-1, 0] = 0.125
    np.testing.assert_array_equal(seen[-1].map, expected)


# Data sets.


@pytest.fixture
def sets(here):
    return unpack(here, "sets")


@pytest.fixture
def as_then(sets, monkeypatch):
    """The versions of libraries that the manifest names, which decide on an image's last bits."""
    then = json.loads((sets / "unfinished" / "manifest.json").read_text())["versions"]
    codecs = dict(codec.rsplit(" ", 1) for codec in then["codecs"].split(", "))
    real = importlib.metadata.distribution

    def distribution(name):
        if then.get(name) == "none":
            raise importlib.metadata.PackageNotFoundError(name)
        if name not in then:
            return real(name)

        class Then:
            version = then[name]

        return Then

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    monkeypatch.setattr(PIL.features, "version", codecs.get)


@pytest.mark.parametrize("name", ["webdataset", "parquet", "files"])
def test_data_set(sets, run, name):
    audit = json.loads(run("verify", name, "--json")[0])
    assert audit["good"]
    assert audit["images"] == audit["samples"] == (3 if name == "webdataset" else 2)


@pytest.mark.parametrize("prompts", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_samples_are_made_again(sets, run, prompts):
    columns = pq.read_table("webdataset/metadata").to_pydict()
    keys = dict(zip(columns["id"], columns["key"], strict=True))
    assert {name.split("-")[0] for name in keys} == {"circle", "cat/1", "square"}
    keys = {name: key for name, key in keys.items() if prompts == 3 or name.startswith("cat/1")}
    run("regenerate", "webdataset", *keys, "--checkpoint", "base", "--output", "again")
    stored = unpack_shards(sets / "webdataset")
    for key in keys.values():
        assert_same_pixels(pixels(f"again/{key}.png"), pixels(stored / f"{key}.png"))


def unpack_shards(data_set: Path) -> Path:
    folder = data_set.with_name(f"{data_set.name} images")
    for shard in sorted((data_set / "data").iterdir()):
        with tarfile.open(shard) as archive:
            archive.extractall(folder, filter="data")
    return folder


def test_an_unfinished_data_set_is_finished(sets, run, as_then):
    before = (sets / "unfinished" / "data" / "000000.tar").read_bytes()
    assert json.loads(run("verify", "unfinished", "--json", code=1)[0])["remake"] == [1]
    words = ["synthesize", "prompts.jsonl", "unfinished", "--checkpoint", "base", *SYNTHESIZE]
    assert "finished: 1 images " in run(*words)[1]
    assert json.loads(run("verify", "unfinished", "--json")[0])["good"]
    assert (sets / "unfinished" / "data" / "000000.tar").read_bytes() == before
    found, expected = (unpack_shards(sets / name) for name in ("unfinished", "webdataset"))
    for image in sorted(expected.glob("*.png")):
        assert_same_pixels(pixels(found / image.name), pixels(image))


def test_columns_of_a_sidecar_that_came_later(sets, run):
    file = sets / "webdataset" / "metadata" / "000001.parquet"
    table = pq.read_table(file)
    pq.write_table(table.drop_columns(["tokens", "bytes", "sampler", "steps"]), file)
    assert json.loads(run("verify", "webdataset", "--json")[0])["good"]


def without_settings(data_set: Path, *names: str) -> None:
    """As if the data set had been written before there were these settings."""
    path = data_set / "manifest.json"
    content = json.loads(path.read_text())
    for name in names:
        del content["settings"][name]
    identity = {name: content[name] for name in ("weights", "prompts", "settings", "versions")}
    files = [{key: file[key] for key in ("rows", "sha256")} for file in content["prompts"]["files"]]
    identity["prompts"] = {**content["prompts"], "files": files}
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    assert bool(names) == (fingerprint != content["fingerprint"])
    content["fingerprint"] = fingerprint
    path.write_text(json.dumps(content))
    for file in (data_set / "metadata").iterdir():
        table = pq.read_table(file)
        note = {**json.loads(table.schema.metadata[b"k3jax"]), "run": fingerprint}
        pq.write_table(table.replace_schema_metadata({"k3jax": json.dumps(note)}), file)


def test_the_fingerprint_of_a_data_set(sets, run):
    """It is a hash of what the file says, and so does not hang on what settings there are."""
    without_settings(sets / "webdataset")
    run("verify", "webdataset")


def test_settings_of_a_data_set_that_came_later(sets, run, as_then):
    without_settings(sets / "unfinished", "int8_text_encoder", "strength")
    run("verify", "unfinished", code=1)
    words = ["synthesize", "prompts.jsonl", "unfinished", "--checkpoint", "base", *SYNTHESIZE]
    assert "finished: 1 images " in run(*words)[1]
    run("verify", "unfinished")


# Training.


@pytest.fixture
def train(here, run):
    """The command of a run of then, with more options."""
    unpack(here, "runs")

    def call(name, *more):
        words = ["--config", f"{name}.py", "--checkpoint", "base", "--output", name]
        return run("train", *words, "--config.train.data.cache=latents", *more)[0]

    return call


def losses(name) -> list[float]:
    return [json.loads(line)["loss"] for line in Path(name, "metrics.jsonl").open()]


@pytest.mark.parametrize("name", ["whole", pytest.param("style", marks=pytest.mark.slow)])
def test_a_run_is_known_to_be_finished(train, name):
    assert "2 steps" in train(name)
    np.testing.assert_allclose(losses(name), EXPECTED["runs"]["losses"][name][:2], rtol=1e-6)


@pytest.mark.parametrize("name", ["style", pytest.param("whole", marks=pytest.mark.slow)])
def test_settings_of_a_run_that_came_later(here, train, name):
    def remove(content):
        train, model = content["train"], content["model"]
        for group, key in (
            (train, "decoder_only"),
            (train["loss"], "layout_weight"),
            (train["loss"], "timesteps"),
            (train["data"], "scene_mix"),
            (train["data"], "crop"),
            (train["masks"], "objects"),
            (train["optimizer"], "eps"),
            (model["movq"], "vq_embed_dim"),
            (model["sampler"], "set_alpha_to_one"),
        ):
            del group[key]

    change(here / name / "run.json", remove)
    assert "2 steps" in train(name)


def test_the_results_of_runs(train, run):
    described = json.loads(run("info", "whole/checkpoint", "--verify", "--json")[0])
    assert described["faults"] == []
    shared = [name for name, part in described["components"].items() if part["shared"]]
    assert sorted(shared) == ["movq", "text_encoder"]
    assert_is("whole/checkpoint", EXPECTED["runs"]["whole"])
    assert digest_of_all(lora_arrays("style/lora").items()) == EXPECTED["runs"]["style"]
    settings = Path("style/lora/lora.json")
    change(settings, lambda content: [content.pop("k3jax"), content["lora"].pop("alpha")])
    assert load_lora("style/lora").config.alpha is None


@pytest.mark.slow
def test_a_lora_is_trained_on(here, train):
    """From its weights, their average and the optimiser's moments, with the latents of then."""
    latents = {path.name: path.stat().st_mtime_ns for path in (here / "latents").rglob("*")}
    assert "step        1" not in train("style", "--steps", "3")
    assert latents == {path.name: path.stat().st_mtime_ns for path in (here / "latents").rglob("*")}
    np.testing.assert_allclose(losses("style"), EXPECTED["runs"]["losses"]["style"], rtol=1e-3)
    found, expected = lora_arrays("style/lora"), EXPECTED["runs"]["longer"]
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name], atol=2e-4, err_msg=name)


@pytest.mark.slow
def test_a_unet_is_trained_on(here, train):
    assert "step        1" not in train("whole", "--steps", "3")
    np.testing.assert_allclose(losses("whole"), EXPECTED["runs"]["losses"]["whole"], rtol=1e-3)


# Exports.


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_an_export_is_converted_back(here, run, layout):
    unpack(here, "exports")
    run("convert", layout, "back")
    expected = EXPECTED["exports"][layout]
    assert to_dict(read_checkpoint("back").config) == expected["config"]
    assert_is("back", expected)


@pytest.mark.slow
def test_settings_of_an_export_that_came_later(here, run):
    unpack(here, "exports")
    (file,) = (here / "original").glob("k3jax*.json")

    def remove(content):
        del content["unet"]["expansion_ratio"], content["sampler"]["set_alpha_to_one"]

    change(file, remove)
    run("convert", "original", "back")
    assert to_dict(read_checkpoint("back").config) == EXPECTED["exports"]["original"]["config"]
