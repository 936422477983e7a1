# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a convolution in optimised HLO, where XLA:TPU writes every matrix product as one."""

import re

import numpy as np


def convolution_flops(
    labels: str,
    window: str,
    lhs: tuple[int, ...],
    rhs: tuple[int, ...],
    out: tuple[int, ...],
) -> float:
    """2 for each multiplication; taps on padding or between dilated elements are not counted.

    Batched matrix products are dilated convolutions, of which most taps fall between.

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
