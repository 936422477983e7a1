# SPDX-License-Identifier: Apache-2.0
"""Meshes, and the one table that maps the logical axis names of the layers to mesh axes.

A layer names the dimensions of its weights (`axes("embed", "mlp")`) and knows nothing of a mesh.
RULES says which mesh axis each name is split over; another layout is another table. Mesh axes are
always `data`, `fsdp` and `tensor`, of any size, with Auto axis types: the compiler places the
collectives.
"""

import contextlib
import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


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
)

TRAINING_RULES = (*(rule for rule in RULES if rule[0] != "time"), ("time", "fsdp"))
"""Of what is trained. A quarter of the U-Net's weights read the time embedding: sampling is faster
with a copy of them on each device, but their average and moments would fill it."""


def axes(*names: str | None) -> dict[str, Any]:
    """Metadata that names the dimensions of a weight. No mesh is needed to create the weight."""
    return {"out_sharding": names, "eager_sharding": False}


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
    """A mesh, and that of the text encoder over the same devices: the same unless it is given."""
    mesh = make_mesh(spec, devices)
    return mesh, mesh if encoder_spec is None else make_mesh(encoder_spec, devices)


def on_mesh(mesh: Mesh) -> contextlib.AbstractContextManager:
    """Programs traced in this context know their mesh; kernels must (k3jax/attention.py)."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def batch_sharding(mesh: Mesh, batch_dim: int = 0) -> NamedSharding:
    """Splits dimension `batch_dim` over the devices that hold different images."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * batch_dim, BATCH))


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays as they lie by a sharding. Where other processes hold a part, all give the same."""
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
        value = variable.get_value()
        names = variable.get_metadata().get("out_sharding") or (None,) * len(value.shape)
        unknown = [n for n in names if n is not None and n not in table]
        if unknown:
            raise ValueError(f"logical axes {unknown} are not in the sharding rules.")
        spec, used = [], set()
        for size, name in zip(value.shape, names, strict=True):
            axis = None if name is None else table[name]
            splits = _axis_size(mesh, axis)
            if axis is None or axis in used or size % splits:
                axis = None
            used.add(axis)
            spec.append(axis)
        return variable.replace(NamedSharding(mesh, PartitionSpec(*spec)))

    state = nnx.state(module)
    return jax.tree.map(sharding, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def placed(module: nnx.Module, mesh: Mesh) -> nnx.Module:
    """An abstract module whose leaves also say how they lie on a mesh."""
    graph, state = nnx.split(module)
    structs = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings(module, mesh),
    )
    return nnx.merge(graph, structs)


def _axis_size(mesh: Mesh, axis) -> int:
    if axis is None:
        return 1
    return math.prod(mesh.shape[a] for a in (axis if isinstance(axis, tuple) else (axis,)))
