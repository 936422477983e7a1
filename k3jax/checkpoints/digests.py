# SPDX-License-Identifier: Apache-2.0
"""Digests of weights: equal for equal arrays, in any files and on any machine.

A digest starts with its kind, as in `sha256:3f0c...`. Checkpoints of older versions (and the
packaged ones) hold digests of an older kind, without a prefix, which is no longer computed. Two
digests of one kind can be compared; digests of two kinds prove nothing.
"""

import hashlib
from collections.abc import Mapping

import numpy as np


KIND = "sha256"
OLDER = ""
"""The kind of digests without a prefix."""
MIXED = "mixed"
"""The kind of a combined digest whose parts are of several kinds."""


def array_digest(array: np.ndarray) -> str:
    """sha256 of dtype, shape and bytes (C order), at 1 to 2 GB/s: faster than a disk writes."""
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


def same_weights(a: str | None, b: str | None) -> bool:
    """Whether two digests prove that the weights are equal."""
    return a is not None and a == b


def prove_difference(a: str, b: str) -> bool:
    """Whether two digests prove that the weights differ."""
    return a != b and kind_of(a) == kind_of(b) != MIXED
