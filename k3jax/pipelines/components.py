# SPDX-License-Identifier: Apache-2.0
"""The components of a checkpoint as modules on a mesh: loaded, or shared with another pipeline."""

from collections.abc import Collection, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from k3jax.checkpoints.digests import same_weights
from k3jax.checkpoints.format import Checkpoint
from k3jax.checkpoints.manifest import read_manifest
from k3jax.checkpoints.restore import restore
from k3jax.model.abstract import COMPONENTS
from k3jax.model.int8 import is_int8
from k3jax.pipelines.streaming import StreamedTextEncoder


Form = Literal["whole", "int8", "streamed"]
"""How the text encoder is held: as it is, in int8, or layer by layer (pipelines/streaming.py)."""


def text_encoder_form(int8: bool, streamed: bool) -> Form:
    """The form that two flags ask for.

    Raises:
        ValueError: both.
    """
    if int8 and streamed:
        raise ValueError(
            "the text encoder is either in int8 or streamed: choose one of int8_text_encoder "
            "(--int8-text-encoder) and stream_text_encoder (--stream-text-encoder)."
        )
    return "int8" if int8 else "streamed" if streamed else "whole"


def load_component(
    checkpoint: Checkpoint,
    name: str,
    mesh: jax.sharding.Mesh,
    dtypes: tuple[Any, Any],
    verify: bool | None = None,
    form: Form = "whole",
) -> nnx.Module | StreamedTextEncoder:
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
    checkpoint: Checkpoint,
    meshes: Mapping[str, jax.sharding.Mesh],
    dtype: str | Mapping[str, str],
    param_dtype: str | None,
    verify: bool | None,
    text_encoder: Form = "whole",
    wanted: Collection[str] | None = None,
) -> dict[str, nnx.Module | None]:
    """Components, straight into their meshes' shardings; see `BasePipeline.from_pretrained`.

    Args:
        meshes: of each component.
        text_encoder: see `text_encoder_form`.
        wanted: those to load, by default all; the others are None.

    Raises:
        ValueError: a dtype or the name of a component that there is not.
    """
    dtypes = {name: (kind, param_dtype or kind) for name, kind in _by_component(dtype).items()}
    for kind in [kind for pair in dtypes.values() for kind in pair]:
        try:
            known = jnp.dtype(kind) in (jnp.bfloat16, jnp.float32)
        except TypeError:  # numpy does not know it
            known = False
        if not known:
            raise ValueError(f"dtype {kind} is not one of bfloat16, float32.")
    wanted = COMPONENTS if wanted is None else wanted
    for name in wanted:
        if name not in COMPONENTS:
            raise ValueError(
                f"components names {name!r}, which is not one of {', '.join(COMPONENTS)}."
            )
    forms: dict[str, Form] = {"text_encoder": text_encoder}
    return {
        name: load_component(
            checkpoint, name, meshes[name], dtypes[name], verify, forms.get(name, "whole")
        )
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
    new = [name for name in COMPONENTS if not same_weights(pipe.digests.get(name), digests[name])]
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


def _form_of(module: nnx.Module | StreamedTextEncoder) -> Form:
    if isinstance(module, StreamedTextEncoder):
        return "streamed"
    return "int8" if is_int8(module) else "whole"


def _dtypes_of(module: nnx.Module | StreamedTextEncoder | None) -> tuple[Any, Any]:
    """(of the computation, of the weights that are not quantised).

    The largest array tells: factors of a LoRA and scales of int8 matrices have dtypes of their own.
    """
    if module is None:
        raise ValueError(
            "the other checkpoint has weights of its own for a component that this pipeline lacks "
            "(it was made without it, or released it), so nothing says their dtype: load that "
            "checkpoint with from_pretrained."
        )
    if isinstance(module, StreamedTextEncoder):
        return module.dtype, module.param_dtype
    leaves = [leaf for leaf in jax.tree.leaves(nnx.state(module)) if leaf.dtype != jnp.int8]
    return module.dtype, max(leaves, key=lambda leaf: leaf.size).dtype
