# SPDX-License-Identifier: Apache-2.0
"""Digests of weights: every change shows, and those of two kinds prove nothing."""

import hashlib
import json
import warnings

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from k3jax.checkpoints import digests
from k3jax.checkpoints.digests import array_digest, combined_digest, prove_difference, same_weights
from k3jax.checkpoints.format import PACKAGED, WEIGHTS, read_checkpoint
from k3jax.checkpoints.lora_files import Lora, warn_of_another_base
from k3jax.checkpoints.manifest import read_manifest
from k3jax.config import LoraConfig
from k3jax.pipelines import loading

from checkpoints import disk_arrays, write


def older(path, *names):
    """Rewrites digests of a checkpoint's manifest in the kind that earlier versions wrote."""
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    for name in names or manifest["components"]:
        digest = manifest["components"][name]
        manifest["components"][name] = hashlib.sha256(digest.encode()).hexdigest()
    file.write_text(json.dumps(manifest))
    return path


def test_values_shape_and_dtype_show():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    digest = array_digest(array)
    assert digest == array_digest(np.asfortranarray(array)) and digest.startswith("sha256:")
    others = [array + 1, array.reshape(4, 3), array.view(np.int32), array.astype(np.float16)]
    assert digest not in {array_digest(other) for other in others}
    for odd in (np.ones((), ml_dtypes.bfloat16), np.zeros((0, 3), np.float16)):
        assert array_digest(odd) == array_digest(odd.copy())


def test_exchanges_show_at_every_distance():
    rng = np.random.default_rng(2)
    words = rng.integers(0, 2**63, 200_000, dtype=np.uint64)
    digest = array_digest(words)
    for distance in (1, 2, 1008, 1009, 1010, 64 * 1009, 100_000, *rng.integers(1, 150_000, 20)):
        changed, place = words.copy(), int(rng.integers(0, 50_000))
        changed[[place, place + distance]] = changed[[place + distance, place]]
        assert array_digest(changed) != digest, distance


def test_combined_digests_have_the_kind_of_their_parts():
    parts = {"a": "1", "b": "2"}
    assert combined_digest(parts) == combined_digest({"b": "2", "a": "1"})
    assert combined_digest({"a": "1"}) != combined_digest({"a": "2"})
    kinds = [digests.kind_of(combined_digest(p)) for p in (parts, {"a": "sha256:1"}, {})]
    assert kinds == [digests.OLDER, "sha256", "sha256"]
    mixed = combined_digest({"a": "1", "b": "sha256:2"})
    assert digests.kind_of(mixed) == digests.MIXED
    assert prove_difference("sha256:1", "sha256:2") and prove_difference("1", "2")
    assert not prove_difference("1", "sha256:1") and not prove_difference(mixed, mixed + "0")


def test_packaged_weights_have_digests_of_the_older_kind():
    """Manifests of earlier versions open, and their digests are equal for equal weights."""
    tiny, inpainting = (read_manifest(epath.Path(WEIGHTS / n))["components"] for n in PACKAGED)
    assert {digests.kind_of(digest) for digest in tiny.values()} == {digests.OLDER}
    assert same_weights(tiny["movq"], inpainting["movq"])
    assert not same_weights(tiny["unet"], inpainting["unet"]) and not same_weights(None, None)
    assert digests.kind_of(read_checkpoint("tiny").fingerprint) == digests.OLDER


@pytest.mark.parametrize("sharer_is_older", [True, False])
def test_an_owner_written_by_another_version_is_not_refused(tmp_path, sharer_is_older):
    base = write(tmp_path / "base")
    flash = write(tmp_path / "flash", share=base)
    older(*((flash, "text_encoder") if sharer_is_older else (base,)))
    assert read_checkpoint(flash).component_path("text_encoder").parent == epath.Path(base)


def test_pipelines_share_what_digests_of_one_kind_prove_equal(tmp_path, monkeypatch):
    ours = read_checkpoint(write(tmp_path / "ours"))
    changed = write(tmp_path / "changed", projection=disk_arrays("text_projection", seed=4))
    old = read_checkpoint(older(write(tmp_path / "old")))
    monkeypatch.setattr(loading, "COMPONENTS", ("text_encoder", "text_projection"))
    monkeypatch.setattr(loading, "_dtypes_of", lambda module: None)
    monkeypatch.setattr(loading, "_form_of", lambda module: None)
    monkeypatch.setattr(loading, "load_component", lambda checkpoint, name, *rest: "loaded")

    class Pipe:
        text_encoder, text_projection = "encoder", "projection"
        digests = loading.component_digests(ours)
        mesh = encoder_mesh = None
        attention = "auto"

    def shared(checkpoint):
        return list(loading.share_components(Pipe, checkpoint, False, None).values())

    assert shared(ours) == ["encoder", "projection"]
    assert shared(read_checkpoint(changed)) == ["encoder", "loaded"]
    assert shared(old) == ["loaded", "loaded"]


def test_a_lora_of_an_earlier_version_is_not_said_to_be_of_another_checkpoint(tmp_path):
    lora = Lora(epath.Path(tmp_path), {}, LoraConfig(), "1" * 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_another_base(lora, "1" * 64)
    with pytest.warns(UserWarning, match="was trained on another checkpoint"):
        warn_of_another_base(lora, "2" * 64)
    with pytest.warns(UserWarning, match="may have been trained on another checkpoint"):
        warn_of_another_base(lora, "sha256:" + "1" * 64)
