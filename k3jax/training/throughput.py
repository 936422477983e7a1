# SPDX-License-Identifier: Apache-2.0
"""Model FLOP utilisation: the share of the devices' peak that the model's arithmetic makes use of.

    MFU = model FLOPs of a step / (seconds of a step * devices * peak FLOP/s of a device)

Model FLOPs (arXiv:2204.02311, appendix B) are those that the mathematics needs: forward and
backward pass, each once. What a compiled program executes is more, because rematerialisation
(`remat`) runs the forward pass of a block again; dividing those FLOPs by the peak gives the
*hardware* FLOP utilisation, which is higher and looks better the more is wasted. So the caller of
`model_flop_utilisation` gives the model FLOPs: `flops_of` a step compiled without `remat`, or three
times those of the forward pass.
"""

from collections.abc import Sequence

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
