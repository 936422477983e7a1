# SPDX-License-Identifier: Apache-2.0
"""Meshes, and the one table that maps the logical axis names of the layers to mesh axes.

A layer names the dimensions of its weights (`axes("embed", "mlp")`) and knows nothing of a mesh.
RULES maps each name to the mesh axis that splits it; another layout is another table. Mesh axes are
always `data`, `fsdp` and `tensor`, of any size, with Auto axis types: the compiler inserts the
collectives.

It must not choose where they are. XLA's partitioner returns wrong values for some of the shardings
that it chooses by itself (tests/test_partitioner.py). So every layer states the sharding of its
weights where it uses them (`gathered`) and of its results (`constrain`), attention runs on the
shards of each device (k3jax/model/attention.py), and nothing between is free:

| | stored | used |
|---|---|---|
| batch of activations | | data, fsdp |
| rows of weights (embed, conv_in) | fsdp | whole |
| columns of weights, channels inside of a block (heads, mlp, conv_out) | tensor | tensor |
| channels between blocks | | whole |
"""

import contextlib
import functools
import math
from types import EllipsisType
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec


MESH_AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

# logical axis -> mesh axis (None: replicated). Each name means one thing wherever it occurs.
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", BATCH),
    ("layers", None),  # stacked encoder layers
    ("vocab", None),
    ("embed", "fsdp"),  # width that a matmul reads from or writes back to the residual stream
    ("heads", "tensor"),  # attention heads, flattened with the head width
    ("mlp", "tensor"),  # hidden width of feed-forward layers
    ("conv_in", "fsdp"),
    ("conv_out", "tensor"),
    ("time", None),  # time embedding that modulates the norms: products of one row per image
    ("tokens", "tensor"),  # activations alone, where `tensor` does not divide the heads
    (
        "strips",
        (*BATCH, "tensor"),
    ),  # activations alone: parts of images (movq_strips.py)
)

TRAINING_RULES = (*(rule for rule in RULES if rule[0] != "time"), ("time", "fsdp"))
"""Of what is trained. A quarter of the U-Net's weights read the time embedding: sampling is faster
with a copy of them on each device, but their average and moments would fill it."""

_USED = {name: None if axis == "fsdp" else axis for name, axis in RULES}
"""Where weights and activations are used."""


def axes(*names: str | None, heads: int | None = None) -> dict[str, Any]:
    """Metadata that names the dimensions of a weight. No mesh is needed to create the weight.

    Args:
        heads: attention heads in the dimension "heads", which is split between them only.
    """
    return {"out_sharding": names, "eager_sharding": False, "heads": heads}


def mesh_sizes(spec: str, count: int) -> dict[str, int]:
    """Axis -> size of 'data=-1,fsdp=1,tensor=2' over `count` devices.

    Raises:
        ValueError: unknown axis, more than one -1, or sizes that do not divide the devices.
    """
    sizes = dict.fromkeys(MESH_AXES, 1)
    for part in filter(None, spec.replace(" ", "").split(",")):
        name, _, size = part.partition("=")
        if name not in MESH_AXES or not size.lstrip("-").isdigit() or int(size) in (0,):
            raise ValueError(
                f"mesh {spec!r}: {part!r} is not AXIS=SIZE with AXIS one of {', '.join(MESH_AXES)}."
            )
        sizes[name] = int(size)
    free = [name for name, size in sizes.items() if size < 0]
    fixed = math.prod(size for size in sizes.values() if size > 0)
    if len(free) > 1 or any(size < -1 for size in sizes.values()):
        raise ValueError(f"mesh {spec!r}: at most one axis may be -1, and no size below -1.")
    if count % fixed or (not free and fixed != count):
        raise ValueError(
            f"mesh {spec!r} takes {fixed} devices{' or a multiple' if free else ''}, "
            f"but there are {count}: choose sizes whose product is {count}."
        )
    for name in free:
        sizes[name] = count // fixed
    return sizes


def make_mesh(spec: str = "data=-1", devices: list | None = None) -> Mesh:
    """A mesh from 'data=-1,fsdp=1,tensor=2'; one size may be -1 (all that remain).

    Raises:
        ValueError: unknown axis, more than one -1, or sizes that do not divide the devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(spec, len(devices))
    return jax.make_mesh(
        tuple(sizes.values()),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=devices,
    )


def make_meshes(
    spec: str, encoder_spec: str | None = None, devices: list | None = None
) -> tuple[Mesh, Mesh]:
    """A mesh, and that of the text encoder over the same devices: the same if None."""
    mesh = make_mesh(spec, devices)
    return mesh, mesh if encoder_spec is None else make_mesh(encoder_spec, devices)


def on_mesh(mesh: Mesh) -> contextlib.AbstractContextManager:
    """Programs traced in this context know their mesh.

    Trace every program on weights that are split over a mesh in it, as pipelines and training do:
    outside of it no layer states its shardings, and the partitioner may return wrong values.
    """
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def traced_mesh() -> AbstractMesh | None:
    """The mesh that a program is traced for, or None if there is nothing to split: no mesh, one
    device, or a program that is split by hand (`jax.shard_map`)."""
    mesh = jax.sharding.get_abstract_mesh()
    known = set(MESH_AXES) <= set(mesh.axis_names)
    return None if not known or mesh.size == 1 or mesh.manual_axes else mesh


def constrain(x: jax.Array, *names: str | EllipsisType | None) -> jax.Array:
    """An activation with the sharding that its dimensions have where they are used.

    Args:
        x: of any shape.
        names: of its dimensions, as in RULES. One ... is for dimensions in the middle that keep
            the sharding that x has.

    Returns:
        x; unchanged where `traced_mesh` is None. A dimension that its mesh axis does not divide is
        replicated.
    """
    mesh = traced_mesh()
    if mesh is None:
        return x
    if ... in names:
        first = names.index(...)
        names = (*names[:first], *(...,) * (x.ndim - len(names) + 1), *names[first + 1 :])
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*_spec(x.shape, names, mesh, _USED)))


def gathered(variable: nnx.Variable, dtype=None, *, whole: bool = False) -> jax.Array:
    """A weight where a layer uses it: gathered over fsdp, split over tensor.

    Its gradient is summed over the batch, then split as the weight is stored.

    Args:
        variable: with the metadata of `axes`; weights taken out of a stack of layers have a
            dimension less than names.
        dtype: to cast to, before what crosses the network.
        whole: gathered over tensor too.
    """
    value = variable[...] if dtype is None else variable[...].astype(dtype)
    mesh, metadata = traced_mesh(), variable.get_metadata()
    names = metadata.get("out_sharding")
    if mesh is None or not names:
        return value
    names = names[len(names) - value.ndim :]
    heads = metadata.get("heads")
    stored = _spec(value.shape, names, mesh, dict(TRAINING_RULES), heads)
    used = [None] * value.ndim if whole else _spec(value.shape, names, mesh, _USED, heads)
    if stored == used:
        return value
    return _gather(value, PartitionSpec(*used), PartitionSpec(*stored))


def split_as_columns(x: jax.Array, variable: nnx.Variable, rows: str = "batch") -> jax.Array:
    """The result (rows, ..., out) of a product with a weight (in, out), split as its columns."""
    mesh, metadata = traced_mesh(), variable.get_metadata()
    if mesh is None or x.ndim < 2:
        return x
    name, heads = metadata["out_sharding"][-1], metadata.get("heads")
    whole = _spec(x.shape[-1:], (name,), mesh, _USED, heads) == [None]
    return constrain(x, rows, ..., None if whole else name)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, used: PartitionSpec, stored: PartitionSpec) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, used)


@_gather.defjvp
def _gather_derivative(used, stored, primals, tangents):
    """Transposed: first as the sum over the batch leaves it, then as the weight is stored."""
    (x,), (dx,) = primals, tangents
    dx = jax.lax.with_sharding_constraint(dx, stored)
    return _gather(x, used, stored), jax.lax.with_sharding_constraint(dx, used)


def batch_sharding(mesh: Mesh, batch_dim: int = 0) -> NamedSharding:
    """Splits dimension `batch_dim` over the devices that hold different images."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * batch_dim, BATCH))


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Places host arrays with a sharding. All processes with a part pass the same arrays."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def one(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree)


def fetch(x: jax.Array) -> np.ndarray:
    """The whole of an array in this process's memory, also what other processes hold of it."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def data_parallelism(mesh: Mesh) -> int:
    """How many ways a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def shardings(module: nnx.Module, mesh: Mesh, rules=RULES) -> nnx.State:
    """NamedShardings of a module's weights, by the logical names of its layers.

    A dimension that the mesh axis does not divide is replicated instead: tiny models run on any
    mesh. A name that RULES does not have is an error.
    """
    table = dict(rules)

    def sharding(variable):
        value, metadata = variable.get_value(), variable.get_metadata()
        names = metadata.get("out_sharding") or (None,) * len(value.shape)
        spec = _spec(value.shape, names, mesh, table, metadata.get("heads"))
        return variable.replace(NamedSharding(mesh, PartitionSpec(*spec)))

    state = nnx.state(module)
    return jax.tree.map(sharding, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def placed(module: nnx.Module, mesh: Mesh) -> nnx.Module:
    """An abstract module whose leaves have their shardings on a mesh."""
    graph, state = nnx.split(module)
    structs = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings(module, mesh),
    )
    return nnx.merge(graph, structs)


def _spec(
    shape: tuple[int, ...],
    names: tuple[str | EllipsisType | None, ...],
    mesh: Mesh | AbstractMesh,
    table: dict[str, Any],
    heads: int | None = None,
) -> list[Any]:
    """The mesh axis of each dimension: None where the axis does not divide it, free for `...`."""
    unknown = [name for name in names if name not in (None, ...) and name not in table]
    if unknown:
        raise ValueError(f"logical axes {unknown} are not in the sharding rules.")
    spec: list[Any] = []
    for size, name in zip(shape, names, strict=True):
        if name is ...:
            spec.append(PartitionSpec.UNCONSTRAINED)
            continue
        axis = None if name is None else table[name]
        parts = heads if name == "heads" and heads else size
        divided = axis is not None and axis not in spec and parts % _axis_size(mesh, axis) == 0
        spec.append(axis if divided else None)
    return spec


def _axis_size(mesh: Mesh | AbstractMesh, axis) -> int:
    if axis is None:
        return 1
    return math.prod(mesh.shape[a] for a in (axis if isinstance(axis, tuple) else (axis,)))
