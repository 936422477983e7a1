# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: restoring a component onto a mesh, reading its arrays, saving and verifying.

The encoder's layers are stacked in the module (`layers.mlp.wo.kernel`, first axis the layer) but
are on disk one by one (`layers.7.mlp.wo.kernel`), so that a host that converts or restores never
holds more than one layer's array and its own shards.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from k3jax.checkpoints import orbax_io
from k3jax.checkpoints.format import (
    CONFIG,
    TOKENIZER,
    Checkpoint,
    as_path,
    packaged_path,
    read_checkpoint,
)
from k3jax.checkpoints.manifest import (
    CARD,
    MANIFEST,
    check_component,
    component_files,
    file_faults,
    files_below,
    read_manifest,
)
from k3jax.checkpoints.writer import CheckpointWriter
from k3jax.config import AttentionForm
from k3jax.files import CheckpointError, is_local, shortened
from k3jax.model.abstract import abstract_module
from k3jax.model.attention import check_attention_form
from k3jax.model.int8 import quantize, with_int8_layers
from k3jax.model.tokenizer import tokenizer_fault
from k3jax.sharding import RULES, shardings


BATCH_BYTES = 512 << 20  # read at once per process, in addition to the module


def restore(
    checkpoint: Checkpoint | epath.PathLike,
    component: str,
    *,
    mesh: Mesh | None = None,
    param_dtype=None,
    dtype=None,
    rules=RULES,
    verify: bool | None = None,
    int8: bool = False,
    attention: AttentionForm = "auto",
) -> nnx.Module:
    """Reads a component straight into its shardings; each process reads only what it holds.

    In a job of several processes, every process with a device in `mesh` must call this.

    Args:
        mesh: where the weights go; this process's first device by default.
        param_dtype: dtype of the weights, cast while reading; the checkpoint's own by default.
        dtype: dtype of the computation; that of the weights by default.
        verify: check the files first, because Orbax does not notice flipped bytes. The default is
            yes for local folders. It costs about 1 s per 3 GB and core, once per user and
            machine: files that were found good are not hashed again until their size or
            modification time changes. With several processes each hashes its share of the
            files, which is all of them on a shared disk. In a bucket the default is no: there
            it would read everything twice. Sizes are compared in any case.
        int8: the matrices of the text encoder's layers become int8 while they are read, one by
            one, on the device; see `k3jax.model.int8`.
        attention: "auto", "xla" or "kernel"; see `k3jax.model.attention`.

    Raises:
        CheckpointError: files that are missing or damaged, or arrays that are unknown, missing
            or of another shape, all named in one message.
        ValueError: a form of attention that the devices do not have.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = read_checkpoint(checkpoint)
    folder = checkpoint.component_path(component)
    kind = param_dtype or checkpoint.dtype
    device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
    check_attention_form(attention, device.platform, dtype or kind)
    try:
        module = abstract_module(component, checkpoint.config, kind, dtype, attention)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path / CONFIG}: {error}") from None
    check_component(
        folder.parent,
        component,
        hashed=is_local(folder) if verify is None else verify,
        share=(jax.process_index(), jax.process_count()),
    )
    leaves = _leaves(module, mesh, rules)
    pieces = [piece for name, leaf in leaves.items() for piece in _pieces(name, leaf)]
    _compare(folder, {piece.name: piece.struct for piece in pieces})
    if int8:
        module = with_int8_layers(module)
        leaves = _leaves(module, mesh, rules)
    return _filled(module, leaves, pieces, folder)


def restore_layers(
    checkpoint: Checkpoint,
    layers: range,
    *,
    mesh: Mesh,
    param_dtype,
    dtype,
    rules=RULES,
    attention: AttentionForm = "auto",
) -> nnx.Module:
    """The text encoder with some consecutive layers and nothing else, or without any.

    Args:
        layers: those to read; no other weights of the module can be used. If empty, all weights
            except those of layers are read, and the module has no layers.
    """
    encoder = dataclasses.replace(checkpoint.config.text_encoder, num_layers=len(layers))
    config = dataclasses.replace(checkpoint.config, text_encoder=encoder)
    module = abstract_module("text_encoder", config, param_dtype, dtype, attention)
    leaves = _leaves(module, mesh, rules)
    chosen = {name: leaf for name, leaf in leaves.items() if _is_stacked(name) == bool(layers)}
    pieces = [piece for name, leaf in chosen.items() for piece in _pieces(name, leaf, layers.start)]
    return _filled(module, leaves, pieces, checkpoint.component_path("text_encoder"))


def _filled(
    module: nnx.Module,
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    pieces: list["_Piece"],
    folder: epath.Path,
) -> nnx.Module:
    """An abstract module with what is read in it; what is not read stays abstract."""
    arrays: dict[str, jax.Array] = {}
    for batch in _batches(pieces):
        loaded = orbax_io.load_arrays(folder, {piece.name: piece.struct for piece in batch})
        for piece in batch:
            array = loaded.pop(piece.name)
            for name, part in _module_leaves(piece.leaf, array, leaves).items():
                if piece.layer is not None:
                    leaf = leaves[name]
                    stack = arrays.get(name)
                    if stack is None:
                        stack = _zeros(leaf.shape, leaf.dtype, leaf.sharding)
                    part = _insert(leaf.sharding)(stack, part, piece.layer)
                arrays[name] = part
        jax.block_until_ready(arrays)  # before the next batch takes memory
    graph, state = nnx.split(module)
    flat = [
        (path, v.replace(arrays.get(_dotted(path), v.get_value())))
        for path, v in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def save_module(writer: CheckpointWriter, component: str, module: nnx.Module) -> None:
    """Writes a module's weights under their on-disk names, stacked layers one by one.

    All of its arrays must be addressable by this process.
    """
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        name, value = _dotted(path), variable.get_value()
        if not _is_stacked(name):
            writer.write(component, {name: np.asarray(value)})
            continue
        for layer in range(value.shape[0]):
            writer.write(component, {_layer_name(name, layer): np.asarray(value[layer])})


def leaf_shapes(
    checkpoint: Checkpoint | epath.PathLike, component: str
) -> dict[str, jax.ShapeDtypeStruct]:
    """On-disk name -> shape and dtype of a component's arrays, sorted by name."""
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = read_checkpoint(checkpoint)
    return orbax_io.array_structs(checkpoint.component_path(component))


def iterate_leaves(
    checkpoint: Checkpoint | epath.PathLike, component: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (on-disk name, array) in the order of the names, in bounded host memory."""
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = read_checkpoint(checkpoint)
    yield from orbax_io.iterate_arrays(checkpoint.component_path(component), BATCH_BYTES // 2)


def verify(path: epath.PathLike, progress: bool = False) -> list[str]:
    """Hashes every file of a checkpoint, shared components included, and loads the tokenizer.

    Returns:
        What is wrong, one line each: missing, changed and unknown files, a tokenizer that cannot be
        read or is another model's. Empty when all is well.

    Raises:
        CheckpointError: there is no usable manifest to compare with.
    """
    path = as_path(packaged_path(path) or path)
    manifest = read_manifest(path)
    faults = file_faults(path, manifest["files"], progress)
    known = {*manifest["files"], MANIFEST, CARD}
    present = [str(file.relative_to(path)) for file in files_below(path)]
    faults += [f"{path / name} is not in the manifest" for name in present if name not in known]
    if faults:
        return faults  # config.json may be one of them
    try:
        checkpoint = read_checkpoint(path)
    except CheckpointError as error:
        return [str(error)]
    if (path / TOKENIZER).exists():
        fault = tokenizer_fault(path / TOKENIZER, checkpoint.config.text_encoder.vocab_size)
        faults += [] if fault is None else [fault]
    for component, folder in checkpoint.component_paths.items():
        if folder.parent != path:
            entries = component_files(read_manifest(folder.parent), component)
            faults += file_faults(folder.parent, entries, progress)
    return faults


class _Piece(NamedTuple):
    """One array on disk, and where it goes."""

    name: str
    struct: jax.ShapeDtypeStruct
    leaf: str
    layer: int | None


def _leaves(module, mesh, rules) -> dict[str, jax.ShapeDtypeStruct]:
    """Dotted name -> shape, dtype and sharding of each of a module's weights."""
    state = nnx.state(module)
    if mesh is None:
        single = SingleDeviceSharding(jax.local_devices()[0])
        placed = {path: single for path, _ in nnx.to_flat_state(state)}
    else:
        flat = nnx.to_flat_state(shardings(module, mesh, rules))
        placed = {path: variable.get_value() for path, variable in flat}
    leaves = {}
    for path, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        struct = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=placed[path])
        leaves[_dotted(path)] = struct
    return leaves


def _pieces(name: str, leaf: jax.ShapeDtypeStruct, first_layer: int = 0) -> Iterator[_Piece]:
    if not _is_stacked(name):
        yield _Piece(name, leaf, name, None)
        return
    sharding = _without_first_axis(leaf.sharding)
    struct = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)
    for layer in range(leaf.shape[0]):
        yield _Piece(_layer_name(name, first_layer + layer), struct, name, layer)


def _module_leaves(
    leaf: str, array: jax.Array, leaves: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """An array of the checkpoint under the names that the module has: itself, or quantised."""
    if leaves[leaf].dtype != jnp.int8:
        return {leaf: array}
    kernel, scale = _quantize(array)
    return {leaf: kernel, f"{leaf.removesuffix('kernel')}scale": scale}


_quantize = jax.jit(quantize, donate_argnums=0)


def _compare(folder: epath.Path, expected: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    found = orbax_io.array_structs(folder)
    misshapen = [
        f"{name} ({found[name].shape} instead of {struct.shape})"
        for name, struct in expected.items()
        if name in found and found[name].shape != struct.shape
    ]
    faults = {
        "missing": sorted(expected.keys() - found.keys()),
        "unknown": sorted(found.keys() - expected.keys()),
        "of another shape": misshapen,
    }
    parts = [f"{len(names)} {what}: {shortened(names)}" for what, names in faults.items() if names]
    if parts:
        raise CheckpointError(
            f"The arrays in {folder} are not those of the architecture in config.json; "
            f"{'; '.join(parts)}."
        )


def _batches(pieces: list[_Piece]) -> Iterator[list[_Piece]]:
    batch, size = [], 0
    for piece in pieces:
        struct, shard = piece.struct, piece.struct.sharding.shard_shape(piece.struct.shape)
        devices = len(struct.sharding.addressable_devices)
        batch.append(piece)
        size += math.prod(shard) * struct.dtype.itemsize * devices
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _zeros(shape, dtype, sharding: Sharding) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


@functools.cache
def _insert(sharding: Sharding):
    """Puts one layer into a stack, in place: the stack is donated."""

    def insert(stack, array, layer):
        return jax.lax.dynamic_update_index_in_dim(stack, array, layer, 0)

    return jax.jit(insert, donate_argnums=0, out_shardings=sharding)


def _without_first_axis(sharding: Sharding) -> Sharding:
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return sharding


def _is_stacked(name: str) -> bool:
    first, _, rest = name.partition(".")
    return first == "layers" and not rest.split(".")[0].isdigit()


def _layer_name(name: str, layer: int) -> str:
    return f"layers.{layer}.{name.removeprefix('layers.')}"


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))
