# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: whose it is (run.json), what it has made (result.json), who works in it.

run.json says what a run was started with, so that another run does not go on in its folder. It is
written when the first step is about to be made: what failed before that leaves the folder free.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
from etils import epath

from k3jax.checkpoints.format import as_path
from k3jax.config import ModelConfig, from_dict, to_dict
from k3jax.files import is_local
from k3jax.training import run_checkpoints as checkpoints
from k3jax.training.run_files import exclusive_lock, write_whole
from k3jax.training.signals import agree
from k3jax.training.train_config import TrainConfig


RUN_FILE, RESULT_FILE, LOCK_FILE = "run.json", "result.json", ".lock"
MAY_CHANGE = (
    "train.steps",  # but see `_steps_fault`
    "train.checkpoint.*",
    "train.log_every",
    "train.sample_every",
    "train.sample_prompts",
    "train.output",
    "train.data.num_workers",
)
"""What a resumed run may have otherwise than the run before; names, or patterns with *."""

_MISSING = object()


class RunFolder:
    """A run's folder, on a local file system."""

    def __init__(self, path: epath.PathLike):
        """
        Raises:
            ValueError: the folder is in a bucket.
        """
        if not is_local(path):
            raise ValueError(
                f"train.output is {path}, which is no local folder, and metrics are lines appended "
                "to a file: train into a local folder, and copy it."
            )
        self.path = Path(as_path(path))

    def lock(self) -> AbstractContextManager[None]:
        """Keeps other processes out of the folder; see `exclusive_lock`."""
        busy = (
            f"another process is training in {self.path} now: wait for it to end, or set another "
            "train.output (--output)."
        )
        return exclusive_lock(self.path / LOCK_FILE, busy)

    def started(self) -> bool:
        """Whether there is anything to go on with: a checkpoint of the run, or a result."""
        results = (self.path / name for name in (RESULT_FILE, "checkpoint", "lora"))
        return self._last_step() > 0 or any(path.exists() for path in results)

    def check(self, description: Mapping[str, Any]) -> None:
        """Checks that what has been made in the folder is of this run.

        Two descriptions are of one run where they mean the same: paths to the same files, fields
        that came later with their defaults, 1 and 1.0.

        Args:
            description: `train` and `model`, as `to_dict` gives them, and `base`, the fingerprint.

        Raises:
            ValueError: the folder belongs to a run that differs, with all that does; it has made
                more steps than this run is to; or run.json cannot be read.
        """
        path = self.path / RUN_FILE
        if not path.exists() or not self.started():
            return
        try:
            recorded = json.loads(path.read_text())
            old = dict(_meaning(recorded))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}): take another output folder, or delete that file "
                "if the folder is of this very run."
            ) from None
        new = dict(_meaning(json.loads(json.dumps(description))))
        faults = [
            f"{name} is {_shown(new, name)} and was {_shown(old, name)}"
            for name in dict.fromkeys([*old, *new])
            if not _same(old.get(name, _MISSING), new.get(name, _MISSING))
            and not any(fnmatchcase(name, pattern) for pattern in MAY_CHANGE)
        ]
        faults += _steps_fault(old, new)
        if faults:
            raise ValueError(
                f"{self.path} holds another run ({'; '.join(faults)}): "
                "take another output folder, or go on with the settings in its run.json."
            )
        made, steps = max(self._last_step(), self._result()[0]), new["train.steps"]
        if made > steps:
            raise ValueError(
                f"the run in {self.path} has made {made} steps, and train.steps is {steps}: give "
                f"--steps {made} or more, or take another output folder."
            )

    def record(self, description: Mapping[str, Any]) -> None:
        """Writes what the run is started with."""
        if jax.process_index() == 0:
            resolved = {**description, "train": _resolved(description["train"])}
            _write_json(self.path / RUN_FILE, resolved)

    def finished(self, steps: int) -> Path | None:
        """The folder of the result, where the run has been trained for so many steps."""
        made, result = self._result()
        there = made == steps and (self.path / result).is_dir()
        return self.path / result if agree(there) else None

    def record_result(self, steps: int, result: Path) -> None:
        """Notes that the result of a run of `steps` is whole."""
        if jax.process_index() == 0:
            _write_json(self.path / RESULT_FILE, {"steps": steps, "result": result.name})

    def _last_step(self) -> int:
        folder = self.path / checkpoints.FOLDER
        names = os.listdir(folder) if folder.is_dir() else ()
        return max((int(name) for name in names if name.isdigit()), default=0)

    def _result(self) -> tuple[int, str]:
        """(steps, name of the folder) of the result; (0, "") where it has to be made (again)."""
        try:
            content = json.loads((self.path / RESULT_FILE).read_text())
            return int(content["steps"]), str(content["result"])
        except (OSError, ValueError, TypeError, KeyError):
            return 0, ""


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def _meaning(description: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Dotted names and values, with what was left to defaults or spelled in another way filled in.

    Where the cache is means nothing, only whether there is one.
    """
    train = _resolved(_completed(TrainConfig, description.get("train") or {}))
    data = train.get("data") or {}
    train["data"] = {**data, "cache": data.get("cache") is not None}
    model = _completed(ModelConfig, description.get("model") or {})
    yield from _flat({**description, "train": train, "model": model}).items()


def _completed(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """With the defaults of fields that came later; as it is where it has fields unknown here."""
    try:
        return to_dict(from_dict(cls, values))
    except ValueError:
        return dict(values)


def _resolved(train: Mapping[str, Any]) -> dict[str, Any]:
    """With absolute paths without links in them."""
    train = dict(train)
    for group in ("data", "prior"):
        path = (train.get(group) or {}).get("path")
        if path and "://" not in path:
            parts = [os.path.realpath(part.strip()) for part in path.split(",") if part.strip()]
            train[group] = {**train[group], "path": ",".join(parts)}
    return train


def _steps_fault(old: Mapping[str, Any], new: Mapping[str, Any]) -> Sequence[str]:
    """More steps make a longer run of the same kind, but for a schedule that ends with the run.

    A cosine of 200 steps and one of 400 differ from the first step on, so what has been made of one
    is no beginning of the other, and the rate would jump.
    """
    name, schedule = "train.steps", "train.optimizer.schedule"
    if new.get(schedule) != "cosine" or old.get(name) == new.get(name):
        return ()
    return [
        f"{name} is {_shown(new, name)} and was {_shown(old, name)}, on which every learning rate "
        f"of a cosine schedule depends"
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> dotted names; an empty dict is a value of its own."""
    if not isinstance(value, dict) or not value:
        return {prefix.removesuffix("."): value}
    return {
        name: leaf
        for key, child in value.items()
        for name, leaf in _flat(child, f"{prefix}{key}.").items()
    }


def _same(one: Any, other: Any) -> bool:
    """Equality for which NaN is NaN."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return one == other


def _shown(flat: Mapping[str, Any], name: str) -> str:
    if name in flat:
        return json.dumps(flat[name])
    inner = any(other.startswith(f"{name}.") for other in flat)
    return "given in parts" if inner else "not given"
