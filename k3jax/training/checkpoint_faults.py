# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a run's checkpoints: which are damaged, and what an error says of it."""

import json
import logging
import math
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
"""In the run's folder: where checkpoints go that cannot be read."""
LOSS = "loss"


class DamagedCheckpoint(CheckpointError):
    """A checkpoint of which a file is missing or damaged."""


def set_aside_unreadable_losses(folder: epath.Path) -> None:
    """Orbax opens no folder in which the losses of one checkpoint are damaged."""
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
            damaged[step] = f"{file} is no JSON"
    for step, reason in damaged.items():
        set_aside(folder, step, reason, steps)
        steps.remove(step)


def set_aside(folder: epath.Path, step: int, reason: str, steps: list[int]) -> None:
    """Moves a damaged checkpoint out of the way of the others of `steps`."""
    path = folder / str(step)
    if len(steps) == 1:
        raise DamagedCheckpoint(
            f"{path} cannot be read ({reason}), and it is the only checkpoint: remove that "
            "folder to begin the run anew."
        )
    place = folder.parent / DAMAGED_FOLDER / str(step)
    warnings.warn(
        f"the checkpoint {path} cannot be read ({reason}) and is moved to {place}; the run "
        "goes on from the newest that is whole.",
        stacklevel=3,
    )
    agree(False)  # all processes have seen it
    if jax.process_index() == 0:
        place.parent.mkdir(exist_ok=True)
        if place.exists():
            place.rmtree()
        path.rename(place)
    agree(False)  # and no process goes on before it is moved


def check_space(folder: epath.Path, size: int) -> None:
    """Checks that the disk has room for a checkpoint of `size` bytes.

    Before Orbax begins: when its writes fail, TensorStore prints a traceback for each of them.

    Raises:
        CheckpointError: it has not, on every process of the job.
    """
    first = jax.process_index() == 0 and is_local(folder)
    free = shutil.disk_usage(folder).free if first else size
    if agree(free < size):
        raise CheckpointError(
            f"A checkpoint in {folder} needs {size / 1e9:.3g} GB, and {free / 1e9:.3g} GB are "
            "free: make room; the checkpoints before it are whole, and the same command goes on "
            "from the newest."
        )


def loss_of(metrics: Mapping[str, float | None] | None) -> float:
    loss = (metrics or {}).get(LOSS)
    return math.inf if loss is None else loss


def differences(found: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> list[str]:
    """What is not alike, a phrase for each kind, with the first few names."""
    missing = [name for name in wanted if name not in found]
    unknown = [name for name in found if name not in wanted]
    unlike = [
        f"{name} ({_kind(found[name])} instead of {_kind(struct)})"
        for name, struct in wanted.items()
        if name in found and _kind(found[name]) != _kind(struct)
    ]
    kinds = {"missing": missing, "unknown": unknown, "of another shape or dtype": unlike}
    return [
        f"{len(names)} {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for kind, names in kinds.items()
        if names
    ]


def _kind(array: Any) -> str:
    return f"{jax.numpy.dtype(array.dtype).name} {tuple(array.shape)}"


def reason_of(error: BaseException) -> str:
    """What the first cause of an error says, in a line; a long one is cut in its middle."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, json.JSONDecodeError):
        return "one of its files is no JSON"
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    # After the text TensorStore puts places in its source and the numbers of errors.
    text = re.split(r" \[[\w ]+=", lines[0])[0].strip().rstrip(".")
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"


def silence_orbax() -> Callable[[], None]:
    """Keeps Orbax from logging exceptions that it also raises, which are put in a sentence.

    Returns:
        Makes it loud again.
    """

    def wanted(record: logging.LogRecord) -> bool:
        told = "orbax" in record.pathname or "never retrieved" in record.getMessage()
        return not (told and record.levelno >= logging.ERROR)

    def undo() -> None:
        for logger in loggers:
            logger.removeFilter(wanted)

    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    for logger in loggers:
        logger.addFilter(wanted)
    return undo
