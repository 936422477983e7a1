# SPDX-License-Identifier: Apache-2.0
"""The components of a checkpoint on a mesh: loaded, or shared with another pipeline."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from k3jax.arguments import whole_number
from k3jax.checkpoints.digests import same_weights
from k3jax.checkpoints.format import Checkpoint
from k3jax.checkpoints.manifest import read_manifest
from k3jax.checkpoints.restore import restore
from k3jax.config import COMPONENTS, AttentionForm
from k3jax.model.int8 import is_int8
from k3jax.model.tokenizer import Tokenizer
from k3jax.pipelines.load_options import LoadOptions, TextEncoderForm
from k3jax.pipelines.programs import image_splits
from k3jax.pipelines.streaming import StreamedTextEncoder
from k3jax.sharding import data_parallelism, make_mesh


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
    attention: AttentionForm = "auto",
) -> Component:
    """One component on its mesh.

    Args:
        dtypes: of the computation, and of the weights.
        form: of the text encoder.
        attention: see `k3jax.model.attention`.
    """
    dtype, param_dtype = (jnp.dtype(kind) for kind in dtypes)
    kwargs = dict(
        mesh=mesh, param_dtype=param_dtype, dtype=dtype, verify=verify, attention=attention
    )
    if form == "streamed":
        return StreamedTextEncoder(checkpoint, **kwargs)
    return restore(checkpoint, name, **kwargs, int8=form == "int8")


def load_checkpoint(checkpoint: Checkpoint, options: LoadOptions) -> dict[str, Any]:
    """The arguments of `BasePipeline` that come from a checkpoint and the devices.

    All but what the weights themselves hold is checked before they are read.
    """
    mesh, encoder_mesh = options.mesh, options.encoder_mesh
    mesh = make_mesh(mesh) if isinstance(mesh, str) else mesh
    if isinstance(encoder_mesh, str):
        encoder_mesh = make_mesh(encoder_mesh, mesh.devices.flat)
    encoder_mesh = mesh if encoder_mesh is None else encoder_mesh
    batch_size = checked_batch_size(options.batch_size, mesh, encoder_mesh)
    names = COMPONENTS if options.components is None else options.components
    tokenizer = Tokenizer(checkpoint.path / "tokenizer") if "text_encoder" in names else None
    components: dict[str, Component | None] = dict.fromkeys(COMPONENTS)
    for name in (name for name in COMPONENTS if name in names):
        encoder = name == "text_encoder"
        components[name] = load_component(
            checkpoint,
            name,
            encoder_mesh if encoder else mesh,
            options.dtypes_of(name),
            options.verify,
            options.text_encoder_form if encoder else "whole",
            options.attention,
        )
    return {
        "tokenizer": tokenizer,
        "components": components,
        "mesh": mesh,
        "encoder_mesh": encoder_mesh,
        "batch_size": batch_size,
        "attention": options.attention,
        "fingerprint": checkpoint.fingerprint,
        "digests": component_digests(checkpoint),
    }


def share_checkpoint(
    pipe: Any, checkpoint: Checkpoint, release: bool, verify: bool | None
) -> dict[str, Any]:
    """As `load_checkpoint`, with the components that `pipe` has already, on its devices."""
    components = share_components(pipe, checkpoint, release, verify)
    same_encoder = components["text_encoder"] is pipe.text_encoder
    return {
        "tokenizer": pipe.tokenizer if same_encoder else Tokenizer(checkpoint.path / "tokenizer"),
        "components": components,
        "fingerprint": checkpoint.fingerprint,
        "digests": component_digests(checkpoint),
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
    new = [name for name in COMPONENTS if not same_weights(pipe.digests.get(name), digests[name])]
    dtypes = {name: _dtypes_of(modules[name]) for name in new}
    forms = {name: _form_of(modules[name]) for name in new}
    for name in new:
        modules[name] = None
        if release:
            pipe.release(name)
    for name in new:
        mesh = pipe.encoder_mesh if name == "text_encoder" else pipe.mesh
        kind = dtypes[name], verify, forms[name], pipe.attention
        modules[name] = load_component(checkpoint, name, mesh, *kind)
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
