# SPDX-License-Identifier: Apache-2.0
"""run.json: what a run was started with, so that another run does not go on in its folder."""

import json
import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
from etils import epath

from k3jax.checkpoint_format import as_path


RUN_FILE = "run.json"
MAY_CHANGE = (
    "steps",
    "checkpoint.*",
    "log_every",
    "sample_every",
    "sample_prompts",
    "output",
)
"""Keys of TrainConfig that a resumed run may have otherwise than the run before."""

_MISSING = object()


def check_same_run(
    folder: epath.PathLike,
    description: Mapping[str, Any],
    may_change: Sequence[str] = MAY_CHANGE,
) -> None:
    """Records a run in its folder, or checks that the folder's run is this one.

    What may change is recorded anew.

    Args:
        folder: the run's.
        description: anything JSON can hold, such as `dataclasses.asdict(train_config)`; tuples
            count as lists. The config may also stand in it under the key "train".
        may_change: dotted names, or patterns with *.

    Raises:
        ValueError: the folder belongs to a run that differs, with all that does.
    """
    path = as_path(folder) / RUN_FILE
    try:
        wanted = json.loads(json.dumps(description))
    except TypeError as error:
        raise ValueError(f"A run's description must be what JSON can hold: {error}.") from error
    recorded = json.loads(path.read_text()) if path.exists() else wanted
    old, new = _flat(recorded), _flat(wanted)
    faults = [
        f"{name} is {_shown(new, name)} and was {_shown(old, name)}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name, _MISSING) != new.get(name, _MISSING) and not _matches(name, may_change)
    ]
    if faults:
        raise ValueError(
            f"{path.parent} holds another run ({'; '.join(faults)}): "
            "take another output folder, or go on with the settings in its run.json."
        )
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.parent / f".{RUN_FILE}.{os.getpid()}.part"
        part.write_text(json.dumps(wanted, indent=2) + "\n")
        part.replace(path)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    names = (name, name.removeprefix("train."))
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> dotted names; an empty dict is a value of its own."""
    if not isinstance(value, dict) or not value:
        return {prefix.removesuffix("."): value}
    return {
        name: leaf
        for key, child in value.items()
        for name, leaf in _flat(child, f"{prefix}{key}.").items()
    }


def _shown(flat: Mapping[str, Any], name: str) -> str:
    if name in flat:
        return json.dumps(flat[name])
    inner = any(other.startswith(f"{name}.") for other in flat)
    return "given in parts" if inner else "not given"
