# SPDX-License-Identifier: Apache-2.0
"""Progress of a process: a bar for people, JSON lines for programs, a text file for Prometheus.

Durations come from the monotonic clock; the time of day appears only in the JSON lines.
"""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Metric, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from tqdm import tqdm


WRITE_EVERY = 5.0  # seconds between two states of the Prometheus file

METRICS = {
    "k3jax_images_total": (CounterMetricFamily, "Images made by this process."),
    "k3jax_failed_samples_total": (CounterMetricFamily, "Failed samples."),
    "k3jax_shards_total": (CounterMetricFamily, "Shards finished by this process."),
    "k3jax_device_seconds_total": (CounterMetricFamily, "Time in which the devices had work."),
    "k3jax_share_samples": (GaugeMetricFamily, "Samples of this process's share."),
    "k3jax_share_samples_finished": (GaugeMetricFamily, "Those of them in finished shards."),
    "k3jax_images_per_second": (GaugeMetricFamily, "Rate since the first image."),
    "k3jax_eta_seconds": (GaugeMetricFamily, "Estimated time to the end of the share."),
}
"""Metric -> its kind and description."""


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
        self._registry = CollectorRegistry()
        self._started: float | None = None
        self._written = 0.0
        self._registry.register(self)
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
        """The first batch begins: the rate counts from here, without loading and compiling."""
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
        """The values of all metrics."""
        with self._lock:
            seconds = time.monotonic() - self._started if self._started else 0.0
            done = self.images + self.failed
            rate = done / seconds if seconds > 0 else 0.0
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

    def collect(self) -> Iterator[Metric]:
        """The metrics as Prometheus' registry asks for them."""
        for name, value in self.state().items():
            kind, description = METRICS[name]
            family = kind(name, description, labels=list(self._labels))
            family.add_metric(list(self._labels.values()), value)
            yield family

    def tick(self, now: bool = False) -> None:
        """Writes the Prometheus file every few seconds."""
        if self._prometheus is None or (not now and time.monotonic() - self._written < WRITE_EVERY):
            return
        self._written = time.monotonic()
        with contextlib.suppress(OSError):  # metrics must not end the run
            write_to_textfile(str(self._prometheus), self._registry)

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
