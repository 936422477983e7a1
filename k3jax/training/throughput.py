# SPDX-License-Identifier: Apache-2.0
"""The speed of training: seconds per step, images per second, model FLOP utilisation (MFU).

    MFU = model FLOPs of a step / (seconds of a step * devices * peak FLOP/s of a device)

Model FLOPs (arXiv:2204.02311, appendix B) are those that the mathematics needs: forward and
backward pass, each once. What a compiled program executes is more, because rematerialisation
(`remat`) runs the forward pass of a block again; dividing those FLOPs by the peak gives the
*hardware* FLOP utilisation, which is higher and looks better the more is wasted. So the caller of
`model_flop_utilisation` gives the model FLOPs: `flops_of` a step compiled without `remat`, or three
times those of the forward pass.
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
    """Peak bfloat16 FLOP/s of a device; None where none is known, as for a CPU."""
    kind = device.device_kind
    if chip := chip_of(kind):
        return chip.peak
    return next((peak for name, peak in PEAK_GPU.items() if kind.startswith(name)), None)


def model_flop_utilisation(
    flops_per_step: float | None, step_time: float, devices: Sequence[jax.Device]
) -> float | None:
    """MFU between 0 and 1; None, rather than a guess, where a peak or the FLOPs are not known.

    Args:
        flops_per_step: model FLOPs of one update, over all devices.
        step_time: seconds.
        devices: all that take part, of every process.
    """
    peaks = [peak_flops(device) for device in devices]
    if not flops_per_step or step_time <= 0 or not peaks or None in peaks:
        return None
    return flops_per_step / (step_time * sum(peaks))


def flops_of(program: jax.stages.Compiled | jax.stages.Lowered) -> float | None:
    """FLOPs of one call of a program; None where XLA does not say.

    Of a compiled one, the hardware FLOPs that each device executes: times the number of devices. Of
    one that is only lowered, those of the whole as it is written.

    XLA counts the body of a loop (`lax.scan`, so also gradient accumulation) once however often it
    runs, and custom calls such as fused attention kernels not at all.
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
            flops_per_step: model FLOPs over the whole mesh, see the top of this file.
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
