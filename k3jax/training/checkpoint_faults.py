# SPDX-License-Identifier: Apache-2.0
"""Faults of a run's checkpoints: damaged files, a full disk, other arrays; and their messages."""

import errno
import json
import logging
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from k3jax.files import CheckpointError, is_local
from k3jax.training.signals import agree


DAMAGED_FOLDER = "damaged_checkpoints"
"""Folder in the run's, for checkpoints that cannot be read."""
LOSS = "loss"


class DamagedCheckpoint(CheckpointError):
    """A checkpoint with a missing or damaged file."""


def set_aside_unreadable_losses(folder: epath.Path) -> None:
    """Moves checkpoints with damaged losses away; with one of them Orbax opens no other."""
    if not folder.is_dir():
        return
    steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    damaged = {}
    for step in steps:
        file = folder / str(step) / "metrics" / "metrics"
        try:
            if file.exists():
                loss_of(json.loads(file.read_text()))
        except (ValueError, AttributeError):
            damaged[step] = f"{file} is not JSON"
    for step, reason in damaged.items():
        set_aside(folder, step, reason, steps)
        steps.remove(step)


def set_aside(folder: epath.Path, step: int, reason: str, steps: list[int]) -> None:
    """Moves a damaged checkpoint into DAMAGED_FOLDER.

    Raises:
        DamagedCheckpoint: it is the only one of `steps`.
    """
    path = folder / str(step)
    if len(steps) == 1:
        raise DamagedCheckpoint(
            f"{path} cannot be read ({reason}), and it is the only checkpoint: remove that "
            "folder to start the run again."
        )
    target = folder.parent / DAMAGED_FOLDER / str(step)
    warnings.warn(
        f"the checkpoint {path} cannot be read ({reason}) and is moved to {target}; the run "
        "resumes from the newest complete one.",
        stacklevel=3,
    )
    agree(False)  # all processes have seen it
    if jax.process_index() == 0:
        target.parent.mkdir(exist_ok=True)
        if target.exists():
            target.rmtree()
        path.rename(target)
    agree(False)  # and no process goes on before it is moved


def check_space(folder: epath.Path, size: int) -> None:
    """Checks that the disk has space for a checkpoint of `size` bytes.

    Before Orbax writes: TensorStore prints a traceback for each write that fails.

    Raises:
        CheckpointError: the disk is too full; on every process of the job.
    """
    first = jax.process_index() == 0 and is_local(folder)
    free = shutil.disk_usage(folder).free if first else size
    if agree(free < size):
        raise CheckpointError(
            f"A checkpoint in {folder} needs {size / 1e9:.3g} GB, and {free / 1e9:.3g} GB are "
            "free: free some space. Earlier checkpoints are complete, and the same command resumes "
            "from the newest."
        )


def loss_of(metrics: Mapping[str, float | None] | None) -> float:
    loss = (metrics or {}).get(LOSS)
    return math.inf if loss is None else loss


def differences(
    stored: Mapping[str, Any], expected: Mapping[str, jax.ShapeDtypeStruct]
) -> list[str]:
    """A phrase for each kind of difference between arrays, with the first few names."""
    missing = [name for name in expected if name not in stored]
    unknown = [name for name in stored if name not in expected]
    different = [
        f"{name} ({_kind(stored[name])} instead of {_kind(struct)})"
        for name, struct in expected.items()
        if name in stored and _kind(stored[name]) != _kind(struct)
    ]
    kinds = {"missing": missing, "unknown": unknown, "of another shape or dtype": different}
    return [
        f"{len(names)} {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for kind, names in kinds.items()
        if names
    ]


def _kind(array: Any) -> str:
    return f"{jax.numpy.dtype(array.dtype).name} {tuple(array.shape)}"


def reason_of(error: BaseException) -> str:
    """The reason of an error: the system's, if it has one, else the first line of its first cause.

    A long line is cut in its middle.
    """
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO):
        if any(os.strerror(number) in str(cause) for cause in causes):
            return os.strerror(number)
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, json.JSONDecodeError):
        return "one of its files is not JSON"
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    # TensorStore appends locations in its source and numbers of errors.
    text = re.split(r" \[[\w ]+=", lines[0])[0].strip().rstrip(".")
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"


def silence_orbax() -> Callable[[], None]:
    """Keeps Orbax from logging exceptions that it also raises.

    Returns:
        A function that ends this.
    """

    def shown(record: logging.LogRecord) -> bool:
        raised = "orbax" in record.pathname or "never retrieved" in record.getMessage()
        return not (raised and record.levelno >= logging.ERROR)

    def undo() -> None:
        for logger in loggers:
            logger.removeFilter(shown)

    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    for logger in loggers:
        logger.addFilter(shown)
    return undo
