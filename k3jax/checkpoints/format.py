# SPDX-License-Identifier: Apache-2.0
"""The files of a checkpoint's folder, and reading its config.json.

    config.json      architecture, conditioning, sampler defaults, source, dtype; written last
    manifest.json    size and CRC-32 of every file, digest of every component
    README.md        the model card, see k3jax/checkpoints/cards.py; not in the manifest
    tokenizer/
    text_encoder/ text_projection/ unet/ movq/      one Orbax checkpoint each

A component may be another checkpoint's: config.json then has its path, relative to the folder when
both are on one disk, so that the two can be moved together.
"""

import dataclasses
import json
import os
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from k3jax.checkpoints.digests import combined_digest, prove_difference
from k3jax.checkpoints.manifest import MANIFEST, read_manifest
from k3jax.config import COMPONENTS, ModelConfig, from_dict, suggestion, to_dict
from k3jax.files import CheckpointError, is_local, read_object


CONFIG = "config.json"
TOKENIZER = "tokenizer"
FORMAT_VERSION = 1
DTYPES = ("bfloat16", "float16", "float32", "float64")
_OWN_KEYS = ("format_version", "source", "dtype", "components")

WEIGHTS = Path(__file__).parents[1] / "weights"
PACKAGED = {"tiny": "text to image", "tiny-inpainting": "inpainting"}
"""The checkpoints that come with k3jax, in `weights/NAME`: a small model of drawn scenes
(configs/models/tiny.py)."""
DEFAULT = WEIGHTS / "tiny"
"""What commands use without --checkpoint."""
INPAINTING = WEIGHTS / "tiny-inpainting"
"""The same for commands that paint a part of an image."""


@dataclass(frozen=True)
class Checkpoint:
    path: epath.Path
    config: ModelConfig
    source: dict[str, Any]
    """Where the weights come from, as the converter noted it."""
    dtype: str
    component_paths: dict[str, epath.Path]
    """Component -> its folder, here or in the checkpoint that shares it."""
    fingerprint: str
    """Digest of all weights: equal for equal arrays, whoever converted them. Not of the config.
    Those of two kinds cannot be compared, see k3jax/checkpoints/digests.py."""

    def component_path(self, component: str) -> epath.Path:
        """The folder of a component; a CheckpointError when the checkpoint has none."""
        if component not in self.component_paths:
            raise CheckpointError(
                f"{self.path} has no component {component!r}"
                f"{suggestion(component, set(self.component_paths))}."
            )
        return self.component_paths[component]


def as_path(path) -> epath.Path:
    """An absolute path, with local links followed, so that '..' in a shared path is meaningful."""
    path = epath.Path(path)
    return epath.Path(os.path.realpath(os.path.expanduser(path))) if is_local(path) else path


def read_checkpoint(path) -> Checkpoint:
    """Reads config.json and manifest.json; touches no weights.

    Args:
        path: a folder, or the name of a checkpoint that comes with k3jax, such as "tiny".

    Raises:
        CheckpointError: not a checkpoint, of another format version, with unknown or missing keys,
            or with a component that is missing or was replaced.
    """
    hint = _hub_hint(str(path))
    path = as_path(packaged_path(path) or path)
    if not path.exists():
        raise CheckpointError(f"There is no checkpoint at {path}: the folder does not exist.{hint}")
    values = _read_config(path)
    header = {key: values.pop(key) for key in _OWN_KEYS}
    try:
        config = from_dict(ModelConfig, values, where=str(path / CONFIG))
    except ValueError as error:
        at = "" if str(path / CONFIG) in str(error) else f"{path / CONFIG}: "
        raise CheckpointError(f"{at}{error}") from None
    digests = read_manifest(path)["components"]
    component_paths = {}
    for name, shared in header["components"].items():
        folder = path / name if shared is None else shared_path(path, shared)
        if not _is_folder(folder):
            raise CheckpointError(_missing_component(path, name, folder, shared))
        if name not in digests:
            raise CheckpointError(
                f"{path / MANIFEST} is damaged: it has no digest of {name}; copy the checkpoint "
                "again."
            )
        component_paths[name] = folder
        current = read_manifest(folder.parent)["components"].get(name)
        if current is None or prove_difference(digests[name], current):
            raise CheckpointError(
                f"{path} was made with another {name} than {folder} now holds: "
                "bring the old one back, or convert the checkpoint again."
            )
    return Checkpoint(
        path, config, header["source"], header["dtype"], component_paths, combined_digest(digests)
    )


def packaged_path(path) -> Path | None:
    """The folder of a packaged checkpoint, if `path` is the name of one and not a path here."""
    if str(path) in PACKAGED and not Path(str(path)).exists():
        return WEIGHTS / str(path)
    return None


def config_bytes(
    config: ModelConfig, source: Mapping[str, Any], dtype: str, components: Mapping[str, str | None]
) -> bytes:
    """The content of config.json."""
    values = {
        "format_version": FORMAT_VERSION,
        "dtype": dtype,
        "source": dict(source),
        "components": {name: components[name] for name in COMPONENTS if name in components},
        **to_dict(config),
    }
    return (json.dumps(values, indent=2) + "\n").encode()


def shared_path(path: epath.Path, shared: str) -> epath.Path:
    """The folder that a path in config.json means for the checkpoint at `path`."""
    if "://" in shared or os.path.isabs(shared):
        return epath.Path(shared)
    # Joined as text: a bucket has no folders in which '..' could be looked up.
    scheme, separator, rest = str(path).rpartition("://")
    return epath.Path(scheme + separator + posixpath.normpath(posixpath.join(rest, shared)))


def looks_like_checkpoint(path: epath.Path) -> bool:
    return (path / CONFIG).exists() and (path / "manifest.json").exists()


def _read_config(path: epath.Path) -> dict[str, Any]:
    if not (path / CONFIG).exists():
        raise CheckpointError(
            f"{path} is not a k3jax checkpoint: it has no {CONFIG}.{_convert_hint(path)}"
        )
    try:
        values = read_object(path / CONFIG)
    except ValueError as error:
        raise CheckpointError(f"{error}: copy the checkpoint again.") from None
    if "format_version" not in values:
        raise CheckpointError(
            f"{path} is not a k3jax checkpoint: its {CONFIG} has no format_version."
            f"{_convert_hint(path)}"
        )
    if values["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {values['format_version']}, but this k3jax reads "
            f"{FORMAT_VERSION}: upgrade k3jax or convert the checkpoint again."
        )
    needed = (*_OWN_KEYS, *(field.name for field in dataclasses.fields(ModelConfig)))
    missing = [key for key in needed if key not in values]
    if missing:
        raise CheckpointError(f"{path / CONFIG} lacks {', '.join(missing)}.")
    if values["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{path / CONFIG} has an unknown dtype {values['dtype']!r}; it must be one of "
            f"{', '.join(DTYPES)}."
        )
    if not isinstance(values["source"], dict):
        raise CheckpointError(
            f"{path / CONFIG}: source is {values['source']!r}, where an object is expected."
        )
    components = values["components"]
    if not isinstance(components, dict) or not set(components) <= set(COMPONENTS):
        raise CheckpointError(
            f"{path / CONFIG} has components {components!r}; known are {', '.join(COMPONENTS)}."
        )
    for name, shared in components.items():
        if shared is not None and (not isinstance(shared, str) or not shared or "\0" in shared):
            raise CheckpointError(
                f"{path / CONFIG}: the path of {name} is {shared!r}, where null or the folder of "
                "another checkpoint is expected."
            )
    return values


def _is_folder(folder: epath.Path) -> bool:
    try:
        return folder.is_dir()
    except OSError:  # a name that is too long, or a folder that may not be entered
        return False


def _convert_hint(path: epath.Path) -> str:
    pytorch = (path / "model_index.json").exists() or any(
        next(iter(path.glob(pattern)), None) is not None
        for pattern in ("*.pt", "*/*.pt", "*.safetensors", "*.bin")
    )
    if not pytorch:
        return ""
    return f" It holds PyTorch weights: convert them with `k3jax convert {path} DESTINATION`."


def _hub_hint(path: str) -> str:
    """For people who give a repository's id, as in diffusers."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path):
        return ""
    return (
        f" If {path} is a repository of the Hugging Face hub, run `k3jax convert {path} DIR` and "
        "load DIR."
    )


def _missing_component(path, name, folder, shared) -> str:
    if shared is None:
        return f"{path} is incomplete: its folder {name} is missing; copy the checkpoint again."
    return (
        f"{path} shares the {name} of another checkpoint, but {folder} does not exist: "
        "move that checkpoint there, or convert this one again."
    )
