# SPDX-License-Identifier: Apache-2.0
"""The speed of training: seconds per step, images per second, model FLOP utilisation (MFU).

    MFU = model FLOPs of a step / (seconds of a step * devices * peak FLOP/s of a device)

Model FLOPs (arXiv:2204.02311, appendix B) are those of one forward and one backward pass. A
compiled program executes more, because rematerialisation (`remat`) repeats the forward pass of each
block; those FLOPs give the *hardware* utilisation, which is higher. Callers of
`model_flop_utilisation` pass the model FLOPs: `flops_of` a step compiled without `remat`, or three
times the forward pass.
"""

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence

import jax

from k3jax.planning.chips import chip_of


# Dense bfloat16 FLOP/s by NVIDIA's data sheets (without sparsity), by the beginning of the name;
# longer ones first.
PEAK_GPU = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,  # SXM, "NVIDIA H100 80GB HBM3"
}


def peak_flops(device: jax.Device) -> float | None:
    """Peak bfloat16 FLOP/s of a device; None if unknown, as for a CPU."""
    kind = device.device_kind
    if chip := chip_of(kind):
        return chip.peak
    return next((peak for name, peak in PEAK_GPU.items() if kind.startswith(name)), None)


def model_flop_utilisation(
    flops_per_step: float | None, step_time: float, devices: Sequence[jax.Device]
) -> float | None:
    """MFU between 0 and 1; None if a peak or the FLOPs are unknown.

    Args:
        flops_per_step: model FLOPs of one update, over all devices.
        step_time: seconds.
        devices: all devices of the mesh, of every process.
    """
    peaks = [peak_flops(device) for device in devices]
    if not flops_per_step or step_time <= 0 or not peaks or None in peaks:
        return None
    return flops_per_step / (step_time * sum(peaks))


def flops_of(program: jax.stages.Compiled | jax.stages.Lowered) -> float | None:
    """FLOPs of one call of a program; None if XLA does not know.

    Of a compiled program: the FLOPs that each device executes. Of a lowered one: the FLOPs of the
    whole program as it is written. XLA counts the body of a loop (`lax.scan`, so also gradient
    accumulation) once, and custom calls such as fused attention kernels not at all.
    """
    try:
        analysis = program.cost_analysis()
    except (NotImplementedError, RuntimeError):  # XlaRuntimeError is one: not on every backend
        return None
    if isinstance(analysis, list | tuple):  # one entry per program in some versions
        analysis = analysis[0] if analysis else None
    flops = (analysis or {}).get("flops")
    return float(flops) if flops is not None and flops > 0 else None  # -1: unknown


class StepTimer:
    """Seconds per step, images per second and MFU over the last few measurements.

    Steps are dispatched long before they are computed. So `mark` is called every few steps, when
    results of a step have arrived on the host. The first call starts the clock: compilation is not
    counted.
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
            flops_per_step: model FLOPs over the whole mesh, see the top of this file.
            devices: all devices of the mesh.
            window: number of measurements of the median.
            clock: returns seconds.
        """
        self.images_per_step = images_per_step
        self.flops_per_step = flops_per_step
        self.devices = tuple(devices)
        self._clock = clock
        self._step_times: deque[float] = deque(maxlen=window)
        self._last: tuple[int, float] | None = None
        self._paused = 0.0

    def mark(self, step: int) -> None:
        """Notes that the results of `step` are on the host."""
        now = self._clock()
        if self._last is not None and step > self._last[0]:
            steps, seconds = step - self._last[0], now - self._last[1] - self._paused
            self._step_times.append(seconds / steps)
        self._last, self._paused = (step, now), 0.0

    @contextlib.contextmanager
    def pause(self, wait_for=None) -> Iterator[None]:
        """Excludes what the `with` does: checkpoints, pictures, validation.

        Args:
            wait_for: arrays of the last dispatched step, such as its state; the clock stops once
                they are computed.
        """
        jax.block_until_ready(wait_for)
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    def metrics(self) -> dict[str, float]:
        """`step_time` (s), `images_per_s` and, if the peak is known, `mfu` (0 to 1).

        Empty before the second `mark`.
        """
        if not self._step_times:
            return {}
        seconds = statistics.median(self._step_times)
        if seconds <= 0:
            return {}
        metrics = {"step_time": seconds, "images_per_s": self.images_per_step / seconds}
        mfu = model_flop_utilisation(self.flops_per_step, seconds, self.devices)
        return metrics if mfu is None else {**metrics, "mfu": mfu}
