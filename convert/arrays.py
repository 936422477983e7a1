# SPDX-License-Identifier: Apache-2.0
"""numpy arrays and PyTorch tensors as views of each other, bfloat16 included."""

import hashlib
import math
from typing import Any

import ml_dtypes
import numpy as np
import torch


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

_BITS = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}


def as_numpy(value: Any) -> np.ndarray:
    """A numpy view of a tensor or array; no copy where the tensor lies in host memory."""
    if not isinstance(value, torch.Tensor):
        return np.asarray(value)
    value = value.detach().cpu()
    if value.dtype == torch.bfloat16:  # numpy has none of its own
        return value.contiguous().view(torch.int16).numpy().view(BFLOAT16)
    return value.numpy()


def as_torch(array: np.ndarray) -> torch.Tensor:
    """A tensor of the same dtype and bits, a view of `array` if that is contiguous and writable."""
    array = np.require(array, requirements=["C", "W"])
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_torch_view(array: np.ndarray) -> torch.Tensor:
    """A tensor over the memory of `array`, also where this is read-only; not to be written to."""
    if array.dtype == BFLOAT16:
        return torch.from_numpy(_unlocked(array.view(np.int16))).view(torch.bfloat16)
    return torch.from_numpy(_unlocked(array))


def permuted(array: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """`np.ascontiguousarray(array.transpose(order))`, several times faster for large weights.

    numpy copies a transposed view element by element (0.3 GB/s for bfloat16); PyTorch's copy of a
    matrix works in blocks (1.2 GB/s), so every permutation is done as transposed matrices and whole
    rows. The bits are moved as integers: NaNs and bfloat16 come through unchanged.
    """
    array = np.ascontiguousarray(array)
    shape = [array.shape[axis] for axis in order]
    bits = torch.from_numpy(_unlocked(array.view(_BITS[array.itemsize])))
    groups = _neighbours(order)
    bits = bits.reshape(
        [math.prod(array.shape[axis] for axis in group) for group in sorted(groups)]
    )
    moved = _reordered(bits, tuple(sorted(groups).index(group) for group in groups))
    return moved.numpy().view(array.dtype).reshape(shape)


def is_finite(array: np.ndarray) -> bool:
    """Whether a float array holds neither NaN nor infinity, at the speed of memory."""
    return inspect(array)[1]


def inspect(array: np.ndarray) -> tuple[str, bool]:
    """(digest, whether all values are finite) in one pass, at 5 GB/s.

    The digest is a sha256 of dtype, shape, and for each piece of the data its end and the sum of
    its 64-bit words: no change that anybody makes to weights leaves it as it was, but it is no
    protection against somebody who wants that.
    """
    digest = hashlib.sha256(f"{array.dtype.name}{array.shape}".encode())
    flat = np.ascontiguousarray(array).reshape(-1)
    mask, limit = _EXPONENT.get(array.dtype.name, (None, None))
    finite = True
    for start in range(0, flat.size, _PART):  # pieces that stay in the processor's cache
        part = flat[start : start + _PART].view(_BITS[array.itemsize])
        if mask is not None and finite:
            finite = int((part & mask).max()) < limit
        words = part.view(np.uint8)
        whole = words.size // 8 * 8
        total = int(words[:whole].view(np.uint64).sum(dtype=np.uint64))
        digest.update(total.to_bytes(8, "little") + words[-64:].tobytes())
    return digest.hexdigest(), finite


_PART = 1 << 17

_EXPONENT = {
    "float64": (0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
    "float32": (0x7FFFFFFF, 0x7F800000),
    "float16": (0x7FFF, 0x7C00),
    "bfloat16": (0x7FFF, 0x7F80),
}
"""Per dtype: all bits but the sign, and the least value of these that is not a finite number."""


def _neighbours(order: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Axes of the source that stay side by side, as groups in the target's order."""
    groups: list[tuple[int, ...]] = []
    for axis in order:
        if groups and groups[-1][-1] + 1 == axis:
            groups[-1] += (axis,)
        else:
            groups.append((axis,))
    return groups


def _copied(bits: torch.Tensor) -> torch.Tensor:
    """A contiguous copy, in memory of numpy's, which comes in huge pages; PyTorch's does not."""
    copy = torch.from_numpy(np.empty(bits.shape, str(bits.dtype).removeprefix("torch.")))
    return copy.copy_(bits)


def _reordered(bits: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    if order == (2, 1, 0):
        a, b, c = bits.shape
        if a >= c:  # (o, i, hw) -> (i, hw, o) as one matrix, then rows of o
            rows = _copied(bits.reshape(a, b * c).t()).reshape(b, c, a)
            return _copied(rows.transpose(0, 1))
        rows = _copied(bits.transpose(0, 1))
        return _copied(rows.reshape(b * a, c).t()).reshape(c, b, a)
    return _copied(bits.permute(order))


class _UnlockedView:
    def __init__(self, array: np.ndarray):
        self.array = array
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface


def _unlocked(array: np.ndarray) -> np.ndarray:
    """A view without the read-only flag, since PyTorch warns of arrays that have it.

    Only for tensors that are read from and thrown away.
    """
    return array if array.flags.writeable else np.asarray(_UnlockedView(array))
