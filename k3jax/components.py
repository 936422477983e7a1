# SPDX-License-Identifier: Apache-2.0
"""The components of a checkpoint as modules on a mesh: loaded, or shared with another pipeline."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from k3jax.abstract import COMPONENTS
from k3jax.checkpoint import restore
from k3jax.checkpoint_format import Checkpoint
from k3jax.manifest import read_manifest
from k3jax.quantization import is_int8


def load_components(
    checkpoint: Checkpoint,
    meshes: Mapping[str, jax.sharding.Mesh],
    dtype: str | Mapping[str, str],
    param_dtype: str | None,
    verify: bool | None,
    int8_text_encoder: bool = False,
    wanted: Collection[str] | None = None,
) -> dict[str, nnx.Module | None]:
    """Components, straight into their meshes' shardings; see `BasePipeline.from_pretrained`.

    Args:
        meshes: of each component.
        wanted: those to load, by default all; the others are None.

    Raises:
        ValueError: a dtype or the name of a component that there is not.
    """
    dtypes = {name: (kind, param_dtype or kind) for name, kind in _by_component(dtype).items()}
    for kind in {kind for pair in dtypes.values() for kind in pair}:
        if jnp.dtype(kind) not in (jnp.bfloat16, jnp.float32):
            raise ValueError(f"dtype {kind} is not one of bfloat16, float32.")
    wanted = COMPONENTS if wanted is None else wanted
    for name in wanted:
        if name not in COMPONENTS:
            raise ValueError(
                f"components names {name!r}, which is not one of {', '.join(COMPONENTS)}."
            )
    int8 = {"text_encoder"} if int8_text_encoder else set()
    return {
        name: _restore(checkpoint, name, meshes[name], dtypes[name], verify, name in int8)
        if name in wanted
        else None
        for name in COMPONENTS
    }


def share_components(
    pipe: Any, checkpoint: Checkpoint, release: bool, verify: bool | None
) -> dict[str, nnx.Module]:
    """The components of a checkpoint: those that `pipe` has, and the others loaded beside them.

    Args:
        pipe: a pipeline, that knows the digests of its weights.
        release: first take what is not shared away from `pipe`.
    """
    digests = component_digests(checkpoint)
    modules = {name: getattr(pipe, name) for name in COMPONENTS}
    new = [name for name in COMPONENTS if digests[name] != pipe.digests.get(name)]
    dtypes = {name: _dtypes_of(modules[name]) for name in new}
    int8 = {name for name in new if is_int8(modules[name])}
    for name in new:
        modules[name] = None
        if release:
            pipe.release(name)
    for name in new:
        mesh = pipe.mesh_of(name)
        modules[name] = _restore(checkpoint, name, mesh, dtypes[name], verify, name in int8)
    return modules


def component_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """Component -> digest of its weights: equal for equal arrays, in whatever checkpoint."""
    return read_manifest(checkpoint.path)["components"]


def _by_component(dtype: str | Mapping[str, str]) -> dict[str, str]:
    if not isinstance(dtype, Mapping):
        return dict.fromkeys(COMPONENTS, dtype)
    unknown = [name for name in dtype if name not in COMPONENTS]
    if unknown:
        raise ValueError(
            f"dtype names {unknown[0]!r}, which is not one of {', '.join(COMPONENTS)}."
        )
    # The projection belongs to the text, wherever it is stored.
    given = {"text_projection": dtype.get("text_encoder", "bfloat16"), **dtype}
    return {name: given.get(name, "bfloat16") for name in COMPONENTS}


def _dtypes_of(module: nnx.Module) -> tuple[Any, Any]:
    """(of the computation, of the weights that are not quantised)."""
    kinds = [leaf.dtype for leaf in jax.tree.leaves(nnx.state(module))]
    return module.dtype, next(kind for kind in kinds if kind != jnp.int8)


def _restore(checkpoint: Checkpoint, name: str, mesh, dtypes: tuple[Any, Any], verify, int8: bool):
    dtype, param_dtype = (jnp.dtype(kind) for kind in dtypes)
    return restore(
        checkpoint,
        name,
        mesh=mesh,
        param_dtype=param_dtype,
        dtype=dtype,
        verify=verify,
        int8=int8,
    )
