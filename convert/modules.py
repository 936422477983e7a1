# SPDX-License-Identifier: Apache-2.0
"""State dicts in memory to NNX modules and back, for tests, notebooks and fine-tuning."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from k3jax.convert.arrays import as_numpy, as_torch
from k3jax.convert.rules import Shape, Table, raise_faults, to_jax_array, to_torch_array


def module_shapes(module: nnx.Module) -> dict[str, Shape]:
    """Dotted parameter name -> shape, for a module with weights or without."""
    return {name: tuple(leaf.shape) for name, leaf in _leaves(module).items()}


def unstacked(table: Table, shapes: Mapping[str, Shape]) -> dict[str, tuple[str, int | None]]:
    """Names as a checkpoint has them, one per layer, for the names of a module.

    A module keeps identical layers stacked along a leading axis (`layers.norm.scale`, shape
    (32, d)); the tables and checkpoints name each layer (`layers.7.norm.scale`).

    Returns:
        Checkpoint name -> (module name, position along the leading axis; None if not stacked).
    """
    names = {}
    for name, shape in shapes.items():
        if table.from_jax(name):
            names[name] = (name, None)
            continue
        parts = name.split(".")
        places = [
            place
            for place in range(1, len(parts))
            if table.from_jax(".".join([*parts[:place], "0", *parts[place:]]))
        ]
        if len(places) != 1:  # the plan reports it as a leaf without a PyTorch name
            names[name] = (name, None)
            continue
        head, tail = parts[: places[0]], parts[places[0] :]
        for layer in range(shape[0]):
            names[".".join([*head, str(layer), *tail])] = (name, layer)
    return names


def layer_shapes(table: Table, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Checkpoint name -> shape, one leaf per layer, for a module's names and shapes."""
    return {
        name: shapes[full] if layer is None else shapes[full][1:]
        for name, (full, layer) in unstacked(table, shapes).items()
    }


def state_dict_to_module(
    table: Table, state_dict: Mapping[str, Any], abstract_module: nnx.Module
) -> nnx.Module:
    """Fills a module that has shapes only with the weights of a PyTorch state dict.

    Args:
        table: names, e.g. `k3jax.convert.keys.table("unet")`.
        state_dict: PyTorch name -> tensor or numpy array.
        abstract_module: from `k3jax.model.abstract.abstract_module`; it is filled in place.
            Each leaf keeps its own dtype, to which the weights are cast.

    Returns:
        `abstract_module`.

    Raises:
        ConversionError: naming all tensors that are unknown, missing, doubled or misshapen, or
            that hold a NaN or an infinity.
    """
    arrays = {name: as_numpy(value) for name, value in state_dict.items()}
    shapes = module_shapes(abstract_module)
    names = unstacked(table, shapes)
    plan = table.to_jax(
        {name: array.shape for name, array in arrays.items()}, layer_shapes(table, shapes)
    )
    leaves = _leaves(abstract_module)
    for alias, name in plan.duplicates:
        if not np.array_equal(arrays[alias], arrays[name]):
            plan.add_fault(f"{alias} and {name} are one tensor but have different values.")
    for step in plan.steps:
        if not np.isfinite(arrays[step.torch_name].astype(np.float32, copy=False)).all():
            plan.add_fault(f"{step.torch_name} holds NaN or infinite values.")
    raise_faults(plan.faults, f"This {table.component}")

    stacks: dict[str, np.ndarray] = {}
    for step in plan.steps:
        full, layer = names[step.jax_name]
        dtype = leaves[full].dtype
        array = to_jax_array(step.rule, arrays[step.torch_name]).astype(dtype, copy=False)
        if layer is None:
            stacks[full] = array
        else:
            stacks.setdefault(full, np.empty(shapes[full], dtype))[layer] = array
    for name, variable in leaves.items():
        variable.set_value(jnp.array(stacks[name]))
    return abstract_module


def module_to_state_dict(table: Table, module: nnx.Module) -> dict[str, torch.Tensor]:
    """The inverse of `state_dict_to_module`, in the dtypes of the module."""
    shapes = module_shapes(module)
    plan = table.to_torch(layer_shapes(table, shapes))
    raise_faults(plan.faults, f"This {table.component}")
    values = {name: np.asarray(leaf[...]) for name, leaf in _leaves(module).items()}
    names = unstacked(table, shapes)
    state_dict = {}
    for step in plan.steps:
        full, layer = names[step.jax_name]
        array = values[full] if layer is None else values[full][layer]
        state_dict[step.torch_name] = as_torch(to_torch_array(step.rule, array))
    return state_dict


def _leaves(module: nnx.Module) -> dict[str, nnx.Variable]:
    """Dotted name -> variable of the module itself, so that it can be set."""
    return {
        ".".join(map(str, path)): variable
        for path, variable in nnx.iter_graph(module)
        if isinstance(variable, nnx.Variable)
    }
