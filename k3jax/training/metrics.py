# SPDX-License-Identifier: Apache-2.0
"""Metrics of a training run: lines on stdout, metrics.jsonl, TensorBoard and sample grids."""

import contextlib
import json
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from k3jax.images.pngs import write_png
from k3jax.training.run_files import name_in_errors, write_whole


METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
RESERVED = ("step", "time", "nonfinite")


class MetricWriter:
    """Writes the metrics of a run, on process 0; on other processes every method does nothing.

    In the folder of the run:

        metrics.jsonl   one line per step: {"step": 10, "time": seconds since 1970, "loss": 0.5}
        tensorboard/    event files, where tensorboardX is installed
        samples/        step_00000010.png
    """

    def __init__(self, folder: str | os.PathLike, progress: bool = True):
        """
        Args:
            folder: of the run; created if necessary.
            progress: also write a line on stdout for every step.
        """
        self.folder = Path(folder)
        self.progress = progress
        self._active = jax.process_index() == 0
        self._last: dict[str, Any] | None = None
        self._last_offset = 0
        self._first_step = 0
        self._tensorboard = None
        if self._active:
            self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def path(self) -> Path:
        return self.folder / METRICS

    def resume(self, step: int) -> None:
        """Drops the lines after `step`, of a run that was killed before its next checkpoint."""
        if not self._active:
            return
        self._first_step, self._last = step + 1, None
        if not self.path.exists():
            return
        kept = [record for record in read_metrics(self.path) if record["step"] <= step]
        text = "".join(map(_line, kept))
        write_whole(self.path, lambda file: file.write(text.encode()))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of a step; a second call for the same step adds to its line.

        A value that is not finite becomes null in the JSONL, with `"nonfinite": true`.

        Raises:
            ValueError: a step before that of the last call, or a reserved name.
        """
        if not self._active:
            return
        values = {name: float(value) for name, value in metrics.items()}
        for name in RESERVED:
            if name in values:
                raise ValueError(f"A metric cannot be called {name!r}; choose another name.")
        self._append(step, values)
        if self.progress:
            print(_readable(step, values), flush=True)
        tensorboard = self._open_tensorboard()
        if tensorboard is not None:
            tensorboard.scalars(step, values)

    def images(self, step: int, name: str, grid: np.ndarray) -> None:
        """Writes a picture: `samples/step_00000010.png` or `samples/step_00000010_name.png`.

        Args:
            name: of the picture; "samples" is left out of the file name.
            grid: uint8 (h, w, 3).
        """
        if not self._active:
            return
        grid = np.asarray(grid)
        if grid.dtype != np.uint8 or grid.ndim != 3 or grid.shape[-1] != 3:
            raise ValueError(f"A picture is uint8 (h, w, 3), not {grid.dtype} {grid.shape}.")
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        suffix = "" if name == "samples" else f"_{name}"
        path = folder / f"step_{step:08d}{suffix}.png"
        with name_in_errors(path):
            write_png(Image.fromarray(grid), path)
        tensorboard = self._open_tensorboard()
        if tensorboard is not None:
            tensorboard.image(step, name, grid)

    def close(self) -> None:
        tensorboard, self._tensorboard = self._tensorboard, None
        if tensorboard:
            tensorboard.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, kind, *exception) -> None:
        # After a first error (a full disk), a second one would hide it.
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self.close()

    def _append(self, step: int, values: dict[str, float]) -> None:
        if self._last is not None and step < self._last["step"]:
            raise ValueError(f"Metrics of step {step} after those of step {self._last['step']}.")
        record = {"step": step, "time": round(time.time(), 3)}
        with name_in_errors(self.path), open(self.path, "ab") as file:
            if self._last is not None and step == self._last["step"]:
                record = self._last
                file.truncate(self._last_offset)
            self._last_offset = file.seek(0, os.SEEK_END)
            for name, value in values.items():
                record[name] = value if math.isfinite(value) else None
            if not all(map(math.isfinite, values.values())):
                record["nonfinite"] = True
            file.write(_line(record).encode())
        self._last = record

    def _open_tensorboard(self):
        if self._tensorboard is None:
            try:
                from k3jax.training.tensorboard import TensorBoard
            except ImportError:
                warnings.warn(
                    "No TensorBoard files are written, because tensorboardX is not installed: "
                    "pip install 'k3jax[train]'.",
                    stacklevel=3,
                )
                self._tensorboard = False  # warn once
            else:
                self._tensorboard = TensorBoard(self.folder / TENSORBOARD, self._first_step)
        return self._tensorboard or None


def read_metrics(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl, without incomplete lines."""
    with open(path, errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and "step" in record:
                yield record


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _readable(step: int, values: Mapping[str, float]) -> str:
    columns = [f"step {step:>8}"]
    for name, value in values.items():
        # NaN must be visible among twenty columns.
        text = f"{value:.4g}" if math.isfinite(value) else f"{value} (!)"
        columns.append(f"{name} {text:<9}")
    return "  ".join(columns).rstrip()
