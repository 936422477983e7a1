# SPDX-License-Identifier: Apache-2.0
"""How long a training step takes."""

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence

import jax

from k3jax.training.throughput import model_flop_utilisation


class StepTimer:
    """Seconds per step, images per second and MFU over the last few measurements.

    Steps are dispatched long before they are computed, so only the moments tell something at which
    the results of a step have arrived on the host. `mark` is called at those, every few steps; the
    first call starts the clock, so compilation is not counted when it follows the first step.
    """

    def __init__(
        self,
        images_per_step: int,
        flops_per_step: float | None = None,
        devices: Sequence[jax.Device] = (),
        *,
        window: int = 20,
        clock=time.perf_counter,
    ):
        """
        Args:
            images_per_step: over the whole mesh.
            flops_per_step: model FLOPs over the whole mesh, see `k3jax.training.throughput`.
            devices: all devices of the mesh.
            window: number of measurements that the median is taken of.
            clock: gives seconds.
        """
        self.images_per_step = images_per_step
        self.flops_per_step = flops_per_step
        self.devices = tuple(devices)
        self._clock = clock
        self._step_times: deque[float] = deque(maxlen=window)
        self._last: tuple[int, float] | None = None
        self._paused = 0.0

    def mark(self, step: int) -> None:
        """The results of `step` are on the host now."""
        now = self._clock()
        if self._last is not None and step > self._last[0]:
            steps, seconds = step - self._last[0], now - self._last[1] - self._paused
            self._step_times.append(seconds / steps)
        self._last, self._paused = (step, now), 0.0

    @contextlib.contextmanager
    def pause(self, wait_for=None) -> Iterator[None]:
        """What happens inside is no part of a step: checkpoints, samples, validation.

        Args:
            wait_for: arrays of the last step dispatched, such as its state. They are waited for
                before the clock stops, or the steps under way would be left out with the rest.
        """
        jax.block_until_ready(wait_for)
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    def metrics(self) -> dict[str, float]:
        """`step_time` (s), `images_per_s` and, where the peak is known, `mfu` (0 to 1).

        Empty before there are two marks.
        """
        if not self._step_times:
            return {}
        seconds = statistics.median(self._step_times)
        if seconds <= 0:
            return {}
        metrics = {"step_time": seconds, "images_per_s": self.images_per_step / seconds}
        mfu = model_flop_utilisation(self.flops_per_step, seconds, self.devices)
        return metrics if mfu is None else {**metrics, "mfu": mfu}
