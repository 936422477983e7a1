# SPDX-License-Identifier: Apache-2.0
"""How the work goes: a bar for people, JSON lines for programs, a text file for Prometheus.

Durations are those of the monotonic clock; the time of day stands in the JSON lines and decides on
nothing.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm


WRITE_EVERY = 5.0  # seconds between two states of the Prometheus file

HELP = {
    "k3jax_images_total": ("counter", "Images made by this process."),
    "k3jax_failed_samples_total": ("counter", "Samples that could not be made."),
    "k3jax_shards_total": ("counter", "Shards finished by this process."),
    "k3jax_device_seconds_total": ("counter", "Time in which the devices had work."),
    "k3jax_share_samples": ("gauge", "Samples of this process's share of the data set."),
    "k3jax_share_samples_finished": ("gauge", "Of them, those in finished shards."),
    "k3jax_images_per_second": ("gauge", "Rate since the first image."),
    "k3jax_eta_seconds": ("gauge", "Estimated time to the end of the share."),
}


class Progress:
    """Counts of one process; the methods may be called by any thread."""

    def __init__(
        self,
        samples: int,
        finished: int,
        labels: Mapping[str, str],
        json_lines: Path | None = None,
        prometheus: Path | None = None,
        bar: bool = False,
    ):
        """
        Args:
            samples, finished: of this process's share; finished when it starts.
            labels: of the metrics.
            json_lines, prometheus: local files; None to do without.
        """
        self.images = self.failed = self.shards = 0
        self.device_seconds = 0.0
        self._samples, self._finished = samples, finished
        self._labels, self._json_lines, self._prometheus = dict(labels), json_lines, prometheus
        self._lock = threading.Lock()
        self._started: float | None = None
        self._written = 0.0
        self._bar = tqdm(
            total=samples, initial=finished, unit="image", disable=not bar, smoothing=0.05
        )
        for path in filter(None, (json_lines, prometheus)):
            path.parent.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.tick(now=True)
        self._bar.close()

    def start(self) -> None:
        """The first batch begins: what came before (loading, compiling) is no part of the rate."""
        self._started = self._started or time.monotonic()

    def device(self, seconds: float) -> None:
        with self._lock:
            self.device_seconds += seconds

    def sample(self, failed: bool) -> None:
        with self._lock:
            self.failed += failed
            self.images += not failed
        self._bar.update()
        if failed:
            self._bar.set_postfix(failed=self.failed, refresh=False)

    def shard(self, name: str, images: int, failed: int, seconds: float) -> None:
        """A shard is finished."""
        with self._lock:
            self.shards += 1
            self._finished += images + failed
        bad = f", {failed} failed" if failed else ""
        tqdm.write(f"{name}: {images} images{bad}", file=sys.stdout)
        sys.stdout.flush()
        self._line(shard=name, images=images, failed=failed, seconds=round(seconds, 3))

    def state(self) -> dict[str, float]:
        """The values of HELP's names."""
        with self._lock:
            seconds = time.monotonic() - self._started if self._started else 0.0
            made = self.images + self.failed
            rate = made / seconds if seconds > 0 else 0.0
            left = self._samples - self._finished
            return {
                "k3jax_images_total": self.images,
                "k3jax_failed_samples_total": self.failed,
                "k3jax_shards_total": self.shards,
                "k3jax_device_seconds_total": round(self.device_seconds, 3),
                "k3jax_share_samples": self._samples,
                "k3jax_share_samples_finished": self._finished,
                "k3jax_images_per_second": round(rate, 4),
                "k3jax_eta_seconds": round(left / rate, 3) if rate else float("nan"),
            }

    def tick(self, now: bool = False) -> None:
        """Brings the Prometheus file up to date, now and then."""
        if self._prometheus is None or (not now and time.monotonic() - self._written < WRITE_EVERY):
            return
        self._written = time.monotonic()
        labels = ",".join(f'{k}="{_escaped(v)}"' for k, v in self._labels.items())
        lines = []
        for name, value in self.state().items():
            kind, text = HELP[name]
            number = "NaN" if value != value else value
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
            lines.append(f"{name}{{{labels}}} {number}")
        part = self._prometheus.with_name(f".{self._prometheus.name}.{os.getpid()}")
        with contextlib.suppress(OSError):  # metrics are not worth the run
            part.write_text("\n".join(lines) + "\n")
            part.replace(self._prometheus)

    def _line(self, **values: Any) -> None:
        if self._json_lines is None:
            return
        state = {name.removeprefix("k3jax_"): value for name, value in self.state().items()}
        eta = state["eta_seconds"]
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **values,
            **state,
            "eta_seconds": None if eta != eta else eta,
        }
        with contextlib.suppress(OSError), open(self._json_lines, "a") as file:
            file.write(json.dumps(line) + "\n")


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
