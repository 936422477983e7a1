# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: its settings (run.json), its result (result.json), its lock.

run.json has the settings of the run: a run with other settings is not resumed in its folder. It is
written before the first step, so a run that fails earlier leaves the folder free.
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
"""Settings that may differ in a resumed run: names, or patterns with *."""

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
                f"train.output is {path}, which is no local folder, and metrics are appended to a "
                "file: train into a local folder, and copy it."
            )
        self.path = Path(as_path(path))

    def lock(self) -> AbstractContextManager[None]:
        """Excludes other processes from the folder; see `exclusive_lock`."""
        busy = (
            f"another process is training in {self.path} now: wait for it to end, or set another "
            "train.output (--output)."
        )
        return exclusive_lock(self.path / LOCK_FILE, busy)

    def started(self) -> bool:
        """Whether there is a checkpoint of the run, or a result."""
        results = (self.path / name for name in (RESULT_FILE, "checkpoint", "lora"))
        return self._last_step() > 0 or any(path.exists() for path in results)

    def check(self, description: Mapping[str, Any]) -> None:
        """Checks that the folder is new or belongs to this run.

        Descriptions are equal if they mean the same: other paths to the same files, missing fields
        and their defaults, 1 and 1.0.

        Args:
            description: `train` and `model`, as `to_dict` gives them, and `base`, the fingerprint.

        Raises:
            ValueError: the folder belongs to another run, with all differences; it has more steps
                than this run; or run.json cannot be read.
        """
        path = self.path / RUN_FILE
        if not path.exists() or not self.started():
            return
        try:
            recorded = json.loads(path.read_text())
            old = dict(_normalised(recorded))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}): use another output folder, or delete that file "
                "if the folder belongs to this run."
            ) from None
        new = dict(_normalised(json.loads(json.dumps(description))))
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
                "use another output folder, or the settings in its run.json."
            )
        finished, steps = max(self._last_step(), self._result()[0]), new["train.steps"]
        if finished > steps:
            raise ValueError(
                f"the run in {self.path} has {finished} steps, and train.steps is {steps}: give "
                f"--steps {finished} or more, or use another output folder."
            )

    def record(self, description: Mapping[str, Any]) -> None:
        """Writes the settings of the run."""
        if jax.process_index() == 0:
            resolved = {**description, "train": _resolved(description["train"])}
            _write_json(self.path / RUN_FILE, resolved)

    def finished(self, steps: int) -> Path | None:
        """The folder of the result, if it is that of so many steps; else None."""
        result_steps, result = self._result()
        exists = result_steps == steps and (self.path / result).is_dir()
        return self.path / result if agree(exists) else None

    def record_result(self, steps: int, result: Path) -> None:
        """Notes that the result of `steps` steps is complete."""
        if jax.process_index() == 0:
            _write_json(self.path / RESULT_FILE, {"steps": steps, "result": result.name})

    def _last_step(self) -> int:
        folder = self.path / checkpoints.FOLDER
        names = os.listdir(folder) if folder.is_dir() else ()
        return max((int(name) for name in names if name.isdigit()), default=0)

    def _result(self) -> tuple[int, str]:
        """(steps, name of the folder) of the result; (0, "") if there is none."""
        try:
            content = json.loads((self.path / RESULT_FILE).read_text())
            return int(content["steps"]), str(content["result"])
        except (OSError, ValueError, TypeError, KeyError):
            return 0, ""


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def _normalised(description: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Dotted names and values in a form that can be compared, with all defaults.

    Of the cache it has only whether there is one, not its path.
    """
    train = _resolved(_completed(TrainConfig, description.get("train") or {}))
    data = train.get("data") or {}
    train["data"] = {**data, "cache": data.get("cache") is not None}
    model = _completed(ModelConfig, description.get("model") or {})
    yield from _flat({**description, "train": train, "model": model}).items()


def _completed(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """With the defaults of missing fields; unchanged if it has unknown fields."""
    try:
        return to_dict(from_dict(cls, values))
    except ValueError:
        return dict(values)


def _resolved(train: Mapping[str, Any]) -> dict[str, Any]:
    """With absolute paths without links."""
    train = dict(train)
    for group in ("data", "prior"):
        path = (train.get(group) or {}).get("path")
        if path and "://" not in path:
            parts = [os.path.realpath(part.strip()) for part in path.split(",") if part.strip()]
            train[group] = {**train[group], "path": ",".join(parts)}
    return train


def _steps_fault(old: Mapping[str, Any], new: Mapping[str, Any]) -> Sequence[str]:
    """More steps continue a run, unless its schedule depends on the number of steps.

    A cosine of 200 steps and one of 400 differ from the first step on.
    """
    name, schedule = "train.steps", "train.optimizer.schedule"
    if new.get(schedule) != "cosine" or old.get(name) == new.get(name):
        return ()
    return [
        f"{name} is {_shown(new, name)} and was {_shown(old, name)}, on which every learning rate "
        f"of a cosine schedule depends"
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> dotted names; an empty dict counts as a value."""
    if not isinstance(value, dict) or not value:
        return {prefix.removesuffix("."): value}
    return {
        name: leaf
        for key, child in value.items()
        for name, leaf in _flat(child, f"{prefix}{key}.").items()
    }


def _same(one: Any, other: Any) -> bool:
    """Equality, also of NaN with NaN."""
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
