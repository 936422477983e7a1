# SPDX-License-Identifier: Apache-2.0
"""What is written to a checkpoint is what is read, on any mesh; components can be shared."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from k3jax.checkpoints import writer as checkpoint_writer
from k3jax.checkpoints.format import read_checkpoint
from k3jax.checkpoints.restore import iterate_leaves, leaf_shapes, restore, save_module, verify
from k3jax.checkpoints.writer import CheckpointWriter
from k3jax.config import COMPONENTS
from k3jax.files import CheckpointError
from k3jax.model import abstract
from k3jax.sharding import make_mesh

from checkpoints import (
    CONFIG,
    disk_arrays,
    flip,
    module_arrays,
    stacked,
    write,
)


def test_components_are_those_of_the_models():
    assert tuple(abstract.COMPONENT_CLASSES) == COMPONENTS


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_round_trip_keeps_every_bit(tmp_path, dtype):
    arrays = disk_arrays("text_encoder", dtype=dtype)
    write(tmp_path / "c", encoder=arrays, dtype=np.dtype(dtype).name)
    shapes = leaf_shapes(tmp_path / "c", "text_encoder")
    assert {n: (s.shape, s.dtype) for n, s in shapes.items()} == {
        n: (a.shape, a.dtype) for n, a in arrays.items()
    }
    read = list(iterate_leaves(tmp_path / "c", "text_encoder"))
    assert [name for name, _ in read] == sorted(arrays)
    for name, array in read:
        assert type(array) is np.ndarray
        np.testing.assert_array_equal(array, arrays[name])
    module = restore(tmp_path / "c", "text_encoder")
    for name, array in stacked(arrays).items():
        ours = module_arrays(module)[name]
        assert isinstance(ours, jax.Array) and ours.dtype == dtype
        np.testing.assert_array_equal(ours, array)


@pytest.mark.parametrize(
    "spec",
    [
        "data=2,fsdp=2,tensor=2",
        *(pytest.param(f"{axis}=8", marks=pytest.mark.slow) for axis in ("data", "fsdp", "tensor")),
    ],
)
def test_restores_into_the_shardings_of_any_mesh(ckpt, spec):
    mesh = make_mesh(spec)
    module = restore(ckpt, "text_encoder", mesh=mesh)
    arrays = module_arrays(module)
    expected = stacked(disk_arrays("text_encoder"))
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name])
        assert array.sharding.mesh == mesh
    wo = arrays["layers.mlp.wo.kernel"]
    assert wo.sharding.spec == PartitionSpec(None, "tensor", "fsdp")
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    assert wo.addressable_shards[0].data.shape == (3, 32 // tensor, 16 // fsdp)


def test_a_restored_module_runs(ckpt):
    def run(module):
        ids = jnp.arange(8).reshape(2, 4)
        return jax.jit(lambda module: module(ids, jnp.ones_like(ids)))(module)

    sharded = restore(ckpt, "text_encoder", mesh=make_mesh("data=2,fsdp=2,tensor=2"))
    np.testing.assert_allclose(run(sharded), run(restore(ckpt, "text_encoder")), atol=1e-5)


def test_without_a_mesh_one_device_holds_it(ckpt):
    for array in module_arrays(restore(ckpt, "text_encoder")).values():
        assert array.devices() == {jax.local_devices()[0]}


def test_a_part_of_the_devices(ckpt):
    mesh = make_mesh("tensor=2", jax.devices()[4:6])
    for array in module_arrays(restore(ckpt, "text_encoder", mesh=mesh)).values():
        assert array.devices() == set(jax.devices()[4:6])


def test_casts_on_the_way(ckpt):
    module = restore(ckpt, "text_encoder", param_dtype="bfloat16", dtype="float32")
    assert module.dtype == jnp.float32
    expected = stacked(disk_arrays("text_encoder"))
    for name, array in module_arrays(module).items():
        assert array.dtype == jnp.bfloat16
        np.testing.assert_array_equal(array, expected[name].astype(ml_dtypes.bfloat16))


def test_read_checkpoint(ckpt):
    read = read_checkpoint(str(ckpt))
    assert read.config == CONFIG
    assert read.source == {"path": "somewhere"} and read.dtype == "float32"
    assert sorted(read.component_paths) == ["text_encoder", "text_projection"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        read.dtype = "bfloat16"
    with pytest.raises(CheckpointError, match="no component 'unett'"):
        restore(read, "unett")


def test_fingerprint_is_of_the_weights(tmp_path, ckpt):
    fingerprint = read_checkpoint(ckpt).fingerprint
    assert read_checkpoint(write(tmp_path / "again")).fingerprint == fingerprint
    assert read_checkpoint(write(tmp_path / "shared", share=ckpt)).fingerprint == fingerprint
    other = write(tmp_path / "other", projection=disk_arrays("text_projection", seed=1))
    assert read_checkpoint(other).fingerprint != fingerprint


def test_save_module_unstacks(tmp_path, ckpt):
    module = restore(ckpt, "text_encoder", mesh=make_mesh("tensor=2,fsdp=4"))
    with CheckpointWriter(tmp_path / "saved") as writer:
        save_module(writer, "text_encoder", module)
        save_module(writer, "text_projection", restore(ckpt, "text_projection"))
        writer.commit(CONFIG, {}, "float32")
    saved, first = read_checkpoint(tmp_path / "saved"), read_checkpoint(ckpt)
    assert leaf_shapes(saved, "text_encoder") == leaf_shapes(first, "text_encoder")
    assert saved.fingerprint == first.fingerprint


def test_many_groups_of_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "GROUP_BYTES", 8000)
    write(tmp_path / "c")
    assert verify(tmp_path / "c") == []
    assert not list((tmp_path / "c").glob("*.*_save*"))
    restored = module_arrays(restore(tmp_path / "c", "text_encoder"))
    for name, array in stacked(disk_arrays("text_encoder")).items():
        np.testing.assert_array_equal(restored[name], array)


def test_non_contiguous_arrays(tmp_path):
    arrays = {n: np.asfortranarray(a) for n, a in disk_arrays("text_encoder").items()}
    for name, array in iterate_leaves(write(tmp_path / "c", encoder=arrays), "text_encoder"):
        np.testing.assert_array_equal(array, arrays[name])


def test_shared_component_moves_with_its_owner(tmp_path):
    write(tmp_path / "models" / "base")
    write(tmp_path / "models" / "flash", share=tmp_path / "models" / "base")
    config = json.loads((tmp_path / "models" / "flash" / "config.json").read_text())
    assert config["components"]["text_encoder"] == "../base/text_encoder"
    assert not (tmp_path / "models" / "flash" / "text_encoder").exists()
    (tmp_path / "models").rename(tmp_path / "moved")
    module = restore(tmp_path / "moved" / "flash", "text_encoder")
    assert module_arrays(module)["embed_tokens.embedding"].shape == (24, 16)
    assert verify(tmp_path / "moved" / "flash") == []
    # sharing from the one that shares ends at the owner
    write(tmp_path / "third", share=tmp_path / "moved" / "flash")
    config = json.loads((tmp_path / "third" / "config.json").read_text())
    assert config["components"]["text_encoder"] == "../moved/base/text_encoder"


def test_missing_swapped_and_damaged_owner(tmp_path, ckpt):
    flash = write(tmp_path / "flash", share=ckpt)
    ckpt.rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"shares the text_encoder .* does not exist"):
        read_checkpoint(flash)
    write(ckpt, encoder=disk_arrays("text_encoder", seed=9))
    with pytest.raises(CheckpointError, match="made with another text_encoder"):
        read_checkpoint(flash)
    shutil.rmtree(ckpt)
    (tmp_path / "gone").rename(ckpt)
    flip(ckpt, "text_encoder")
    assert len(verify(flash)) == 1


def test_shared_component_of_another_architecture(tmp_path, ckpt):
    other = dataclasses.replace(
        CONFIG, text_encoder=dataclasses.replace(CONFIG.text_encoder, num_heads=4)
    )
    with pytest.raises(CheckpointError, match=r"text_encoder of .* has another architecture"):
        write(tmp_path / "flash", share=ckpt, config=other)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt"]
