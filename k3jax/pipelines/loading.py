# SPDX-License-Identifier: Apache-2.0
"""The components of a checkpoint on a mesh: loaded, or shared with another pipeline."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from k3jax.arguments import whole_number
from k3jax.checkpoints.digests import same_weights
from k3jax.checkpoints.format import Checkpoint
from k3jax.checkpoints.manifest import read_manifest
from k3jax.checkpoints.restore import restore
from k3jax.model.abstract import COMPONENTS
from k3jax.model.int8 import is_int8
from k3jax.pipelines.load_options import LoadOptions, TextEncoderForm
from k3jax.pipelines.programs import image_splits
from k3jax.pipelines.streaming import StreamedTextEncoder
from k3jax.sharding import data_parallelism


Component = nnx.Module | StreamedTextEncoder


def checked_batch_size(
    batch_size: int | None, mesh: jax.sharding.Mesh, encoder_mesh: jax.sharding.Mesh
) -> int:
    """Images per compiled batch; one per device where it is None.

    Raises:
        ValueError: no whole number of 1 or more, or one that does not split over the meshes.
    """
    size = data_parallelism(mesh) if batch_size is None else batch_size
    size = whole_number(size, "batch_size", least=1)
    for each in (mesh, encoder_mesh):
        image_splits(each, size)
    return size


def load_component(
    checkpoint: Checkpoint,
    name: str,
    mesh: jax.sharding.Mesh,
    dtypes: tuple[Any, Any],
    verify: bool | None = None,
    form: TextEncoderForm = "whole",
) -> Component:
    """One component on its mesh.

    Args:
        dtypes: of the computation, and of the weights.
        form: of the text encoder.
    """
    dtype, param_dtype = (jnp.dtype(kind) for kind in dtypes)
    kwargs = dict(mesh=mesh, param_dtype=param_dtype, dtype=dtype, verify=verify)
    if form == "streamed":
        return StreamedTextEncoder(checkpoint, **kwargs)
    return restore(checkpoint, name, **kwargs, int8=form == "int8")


def load_components(
    checkpoint: Checkpoint, meshes: Mapping[str, jax.sharding.Mesh], options: LoadOptions
) -> dict[str, Component | None]:
    """Components, straight into their meshes' shardings; None for those that are left out.

    Args:
        meshes: of each component.
    """
    forms: dict[str, TextEncoderForm] = {"text_encoder": options.text_encoder_form}
    names = COMPONENTS if options.components is None else options.components
    return {
        name: load_component(
            checkpoint,
            name,
            meshes[name],
            options.dtypes_of(name),
            options.verify,
            forms.get(name, "whole"),
        )
        if name in names
        else None
        for name in COMPONENTS
    }


def share_components(
    pipe: Any, checkpoint: Checkpoint, release: bool, verify: bool | None
) -> dict[str, Component]:
    """The components of a checkpoint: those that `pipe` has, and the others loaded.

    Args:
        pipe: a pipeline that knows the digests of its weights.
        release: first release from `pipe` what is not shared.
    """
    digests = component_digests(checkpoint)
    modules = {name: getattr(pipe, name) for name in COMPONENTS}
    new = [
        name
        for name in COMPONENTS
        if not same_weights(pipe.digests.get(name), digests[name], checkpoint.component_path(name))
    ]
    dtypes = {name: _dtypes_of(modules[name]) for name in new}
    forms = {name: _form_of(modules[name]) for name in new}
    for name in new:
        modules[name] = None
        if release:
            pipe.release(name)
    for name in new:
        mesh = pipe.mesh_of(name)
        modules[name] = load_component(checkpoint, name, mesh, dtypes[name], verify, forms[name])
    return modules


def component_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """Component -> digest of its weights: equal for equal arrays, in whatever checkpoint."""
    return read_manifest(checkpoint.path)["components"]


def _form_of(module: Component | None) -> TextEncoderForm:
    if isinstance(module, StreamedTextEncoder):
        return "streamed"
    return "int8" if is_int8(module) else "whole"


def _dtypes_of(module: Component | None) -> tuple[Any, Any]:
    """(of the computation, of the weights that are not quantised).

    The dtype of the weights is that of the largest array: factors of a LoRA and scales of int8
    matrices have dtypes of their own.
    """
    if module is None:
        raise ValueError(
            "the other checkpoint has weights of its own for a component that this pipeline lacks "
            "(it was made without it, or released it), so its dtype is unknown: load that "
            "checkpoint with from_pretrained."
        )
    if isinstance(module, StreamedTextEncoder):
        return module.dtype, module.param_dtype
    leaves = [leaf for leaf in jax.tree.leaves(nnx.state(module)) if leaf.dtype != jnp.int8]
    return module.dtype, max(leaves, key=lambda leaf: leaf.size).dtype
