# SPDX-License-Identifier: Apache-2.0
"""k3jax.json: the settings of a model for which PyTorch's layouts have no place.

An export writes it beside the weights, where other programs pass over it, and a conversion reads
it, so that a model comes back with its image size and sampler, and needs no --config.
"""

from collections.abc import Mapping
from typing import Any

from k3jax.config import ModelConfig, from_dict, suggestion, to_dict
from k3jax.convert.rules import ConversionError


SAMPLER_ALONE = ("name", "num_inference_steps", "guidance_scale", "eta", "threshold_percentile")
"""Settings of a sampler that diffusers' scheduler_config.json does not have."""
_PARTS = ("sampler", "unet", "movq")


def settings_file(layout: str, end: str) -> str:
    """Name of the file; `end` is what the original files of a variant append to their names."""
    return "k3jax.json" if layout == "diffusers" else f"k3jax{end}.json"


def own_settings(config: ModelConfig, layout: str) -> dict[str, Any]:
    """The content of the file.

    In the original layout no file describes the U-Net and MoVQ (whose codebook is left out there).
    """
    values = to_dict(config)
    if layout == "diffusers":
        sampler = {name: values["sampler"][name] for name in SAMPLER_ALONE}
        return {"sample_size": config.sample_size, "sampler": sampler}
    movq = {**values["movq"], "num_vq_embeddings": 0}
    return {
        "sample_size": config.sample_size,
        "sampler": values["sampler"],
        "unet": values["unet"],
        "movq": movq,
    }


def with_own_settings(
    parts: Mapping[str, Any], values: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The parts of a ModelConfig, with what the file says of them.

    Raises:
        ConversionError: a setting that there is not, or of a wrong type.
    """
    parts = dict(parts)
    for key, value in values.items():
        if key == "sample_size":
            if type(value) is not int:
                raise ConversionError(f"{where}: sample_size is {value!r}, not an integer.")
            parts[key] = value
        elif key not in _PARTS or not isinstance(value, Mapping):
            near = suggestion(key, {"sample_size", *_PARTS})
            raise ConversionError(f"{where} has no group of settings {key!r}{near}.")
        else:
            part = parts[key]
            try:
                parts[key] = from_dict(type(part), {**to_dict(part), **value}, f"{where}: {key}")
            except ValueError as error:
                at = "" if where in str(error) else f"{where}: "
                raise ConversionError(f"{at}{error}") from None
    return parts
