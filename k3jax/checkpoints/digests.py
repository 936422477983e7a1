# SPDX-License-Identifier: Apache-2.0
"""Digests of weights: equal for equal arrays, in whatever files and on whatever machine they are.

A digest starts with its kind, as in `sha256:3f0c...`. Checkpoints of older versions hold digests
without one. Digests of two kinds are never compared with each other: where both arrays are at hand,
the digest of one is computed anew in the kind of the other (`same_weights`); where they are not,
nothing is claimed (`prove_difference`).
"""

import functools
import hashlib
from collections.abc import Mapping

import numpy as np
from etils import epath


KIND = "sha256"
OLDER = ""
"""The kind of digests without a prefix."""
MIXED = "mixed"
"""Of several parts whose digests are not all of one kind."""

BATCH_BYTES = 256 << 20
_LANES = 1009
_PIECE = 64 * _LANES


def array_digest(array: np.ndarray) -> str:
    """sha256 of dtype, shape and bytes, at 1 to 2 GB/s: checkpoints are not written faster."""
    shape = "x".join(map(str, array.shape))
    digest = hashlib.sha256(f"{array.dtype.name} {shape}\n".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return f"{KIND}:{digest.hexdigest()}"


def combined_digest(parts: Mapping[str, str]) -> str:
    """One digest for named digests, in the order of their names; of their kind, or MIXED."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(parts.items()))
    kinds = {kind_of(digest) for digest in parts.values()} or {KIND}
    kind = kinds.pop() if len(kinds) == 1 else MIXED
    return f"{kind}:".lstrip(":") + hashlib.sha256(lines.encode()).hexdigest()


def kind_of(digest: str) -> str:
    return digest.rpartition(":")[0]


def abbreviated(digest: str) -> str:
    """The first 12 hexadecimal digits, for people."""
    return digest.rpartition(":")[2][:12]


def prove_difference(a: str, b: str) -> bool:
    """Whether two digests show that the weights differ; those of two kinds show nothing."""
    return a != b and kind_of(a) == kind_of(b) != MIXED


def same_weights(noted: str | None, current: str | None, folder: epath.Path) -> bool:
    """Whether a component is the one whose digest was noted.

    Args:
        noted: digest of the component as it was.
        current: digest that the component's checkpoint holds.
        folder: the component; it is read where the two digests are of different kinds.
    """
    if noted is None or current is None or kind_of(noted) == kind_of(current):
        return noted == current
    return noted == _component_digest(str(folder), current, kind_of(noted))


@functools.lru_cache(16)
def _component_digest(folder: str, current: str, kind: str) -> str | None:
    """The digest of a component's arrays in another kind; None for a kind that is not known.

    Args:
        current: the digest it has, so that another component at this place is read anew.
    """
    from k3jax.checkpoints.orbax_io import (
        iterate_arrays,  # imports JAX, which `read_checkpoint` does not need
    )

    functions = {KIND: array_digest, OLDER: _older_array_digest}
    if kind not in functions:
        return None
    arrays = iterate_arrays(epath.Path(folder), BATCH_BYTES)
    return combined_digest({name: functions[kind](array) for name, array in arrays})


def _older_array_digest(array: np.ndarray) -> str:
    """As earlier versions computed it: blind to some exchanges of 64-bit words within an array."""
    shape = "x".join(map(str, array.shape))
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    whole = data.size // 8 * 8
    words = data[:whole].view(np.uint64)
    digest = hashlib.sha256(data[whole:].tobytes())
    for start in range(0, words.size, _PIECE):
        piece = words[start : start + _PIECE]
        lanes = piece.size // _LANES * _LANES
        digest.update(piece[:lanes].reshape(-1, _LANES).sum(0, dtype=np.uint64).tobytes())
        digest.update(piece[lanes:].tobytes())
    return f"{array.dtype.name} {shape} {digest.hexdigest()[:32]}"
