# SPDX-License-Identifier: Apache-2.0
"""numpy arrays and PyTorch tensors as views of each other, bfloat16 included."""

from typing import Any

import jax
import ml_dtypes
import numpy as np
import torch


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""The safetensors format's names of dtypes, those that are read and written here."""

_BITS = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}


def as_numpy(value: Any) -> np.ndarray:
    """A numpy view of a tensor or array; no copy of tensors in host memory."""
    if not isinstance(value, torch.Tensor):
        return np.asarray(value)
    value = value.detach().cpu()
    if value.dtype == torch.bfloat16:  # numpy has no such dtype
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

    numpy copies a transposed view element by element (0.3 GB/s for bfloat16). JAX's transfer of a
    strided array to a CPU device works in blocks (2 GB/s), and gives back its memory as it is. The
    result may be read-only.
    """
    moved = array.transpose(order)
    small = array.size < 1 << 16  # a call of JAX takes a millisecond
    if small or moved.flags.c_contiguous or array.itemsize > 4:  # JAX would narrow 64 bits to 32
        return np.ascontiguousarray(moved)
    return np.asarray(jax.device_put(moved, jax.local_devices(backend="cpu")[0]))


def bits_of(array: np.ndarray) -> np.ndarray:
    """The same memory as integers, so that NaNs compare equal to themselves."""
    return array.view(_BITS[array.itemsize])


def is_finite(array: np.ndarray) -> bool:
    """Whether a float array holds neither NaN nor infinity, at the speed of memory."""
    mask, limit = _EXPONENT[array.dtype.name]
    flat = bits_of(np.ascontiguousarray(array).reshape(-1))
    # In pieces that stay in the processor's cache.
    pieces = (flat[start : start + _PART] for start in range(0, flat.size, _PART))
    return all(int((piece & mask).max()) < limit for piece in pieces)


_PART = 1 << 17

_EXPONENT = {
    "float64": (0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
    "float32": (0x7FFFFFFF, 0x7F800000),
    "float16": (0x7FFF, 0x7C00),
    "bfloat16": (0x7FFF, 0x7F80),
}
"""Per dtype: all bits but the sign, and the least value of these that is not a finite number."""


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
