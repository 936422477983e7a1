# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a kernel in optimised HLO, where XLA:TPU writes matrix products as convolutions."""

import math
import re

import numpy as np

from k3jax.planning.hlo import Computation, Instruction, Module


def kernel_flops(module: Module, i: Instruction, inside: Computation) -> float:
    """Of the matrix products and convolutions in an instruction: 2 for a multiply-add.

    Elementwise arithmetic does not run on the matrix unit, and is in the schedule's cycles.
    """
    if i.op == "convolution":
        lhs, rhs = (inside.by_name[n].arrays[0].shape for n in i.operands[:2])
        labels = i.attribute(r"dim_labels=(\w+->\w+)")
        window = i.attribute(r"window=\{([^}]*)\}") or ""
        return convolution_flops(labels, window, lhs, rhs, i.arrays[0].shape)
    if i.op == "dot":
        lhs = inside.by_name[i.operands[0]].arrays[0].shape
        over = i.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
        contracted = math.prod(lhs[int(d)] for d in over.split(",") if d)
        return 2 * math.prod(i.arrays[0].shape) * contracted
    if i.op == "custom-call":  # Pallas kernels declare their FLOPs
        return int(i.attribute(r'"cost_estimate":\{"flops":"(\d+)"') or 0)
    if i.op in ("fusion", "async-start"):
        return sum(_computation_flops(module, name) for name in i.called)
    return 0


def _computation_flops(module: Module, name: str) -> float:
    if ("flops", name) not in module.cache:
        inside = module.computations[name]
        flops = sum(kernel_flops(module, i, inside) for i in inside.instructions)
        module.cache["flops", name] = flops
    return module.cache["flops", name]


def convolution_flops(
    labels: str,
    window: str,
    lhs: tuple[int, ...],
    rhs: tuple[int, ...],
    out: tuple[int, ...],
) -> float:
    """2 for each multiplication; taps on padding or between dilated elements are not counted.

    Batched matrix products are dilated convolutions, most taps of which fall between elements.

    Args:
        labels: of the dimensions, such as "b01f_01io->b01f".
        window: such as "size=3x3 stride=2x2 pad=1_1x0_0".
    """
    left, right, result = re.fullmatch(r"(\w+)_(\w+)->(\w+)", labels).groups()
    settings = dict(re.findall(r"(\w+)=([\w\-]+)", window))

    def setting(key: str, dimension: int, default: int) -> int:
        if key not in settings:
            return default
        return int(settings[key].split("x")[dimension].split("_")[0])

    total = 2.0 * out[result.index("b")] * out[result.index("f")] * rhs[right.index("i")]
    for d in range(sum(label.isdigit() for label in left)):
        total *= taps(
            size=lhs[left.index(str(d))],
            outputs=out[result.index(str(d))],
            window=rhs[right.index(str(d))],
            stride=setting("stride", d, 1),
            pad=setting("pad", d, 0),
            lhs_dilate=setting("lhs_dilate", d, 1),
            rhs_dilate=setting("rhs_dilate", d, 1),
        )
    return total


def taps(*, size, outputs, window, stride, pad, lhs_dilate, rhs_dilate) -> int:
    """Pairs of an output and a tap of its window, along one dimension, that fall on an element."""
    first = np.arange(outputs, dtype=np.int64) * stride - pad  # where each window begins
    if rhs_dilate > 1:
        at = first[:, None] + np.arange(window) * rhs_dilate
        inside = (at % lhs_dilate == 0) & (at >= 0) & (at < size * lhs_dilate)
        return int(inside.sum())
    # Multiples of the dilation in [begin, end): there may be 100,000 outputs with as many taps.
    begin = np.maximum(first, 0)
    end = np.minimum(first + window, size * lhs_dilate)
    found = -(-end // lhs_dilate) + (-begin // lhs_dilate)
    return int(np.maximum(found, 0).sum())
