# SPDX-License-Identifier: Apache-2.0
"""Files as accidents leave them, drawn from a seed."""

import contextlib
import copy
import json
import random
import signal
from collections.abc import Callable, Iterator
from typing import Any

from k3jax.files import LFS_POINTER


ODD_VALUES = [
    *(None, True, False, 0, -1, 1, 3, 7, 2**31, 2**63, 2**64, -(2**70), 10**400),
    *(
        0.5,
        -0.0,
        1e308,
        float("nan"),
        float("inf"),
        "",
        "x",
        "4",
        "\ud800",
        "\0",
        "../..",
        "é" * 300,
    ),
    *([], [[]], [0], [-1], [2**62, 2**62], ["a"], [None] * 40, {}, {"a": 1}, {"": {}}),
]


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    """Cut, emptied, flipped, overwritten, lengthened, or replaced by something else."""
    size, kind = len(content), rng.randrange(9)
    at = rng.randrange(size) if size else 0
    if kind == 0:
        return content[:at]
    if kind == 1:
        return rng.choice((b"", b"\0" * size, b"\xff" * size, b"{", b"[]", b"null"))
    if kind in (2, 3, 4):  # the commonest, and the most telling
        changed = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 8)) if size else 0):
            changed[rng.randrange(min(size, rng.choice((16, 400, size))))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 5:
        return content[:at] + rng.randbytes(rng.choice((1, 8, 300))) + content[at:]
    if kind == 6:
        length = rng.choice((1, 8, 300))
        return content[:at] + rng.choice((b"\0", b"\xff", b"9")) * length + content[at + length :]
    if kind == 7:
        return content + rng.choice((b"\0", content, rng.randbytes(50)))
    return LFS_POINTER + b"v1\noid sha256:4d7a\nsize 24\n"


def damaged_values(values: Any, rng: random.Random) -> Any:
    """A JSON document with one to three of its values lost, doubled, renamed or exchanged."""
    values = copy.deepcopy(values)
    for _ in range(rng.choice((1, 1, 2, 3))):
        node, key = rng.choice(list(_places(values)) or [([values], 0)])
        kind = rng.randrange(6)
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[rng.choice(("", "x", str(key) + "s"))] = node.pop(key)
        elif kind == 2 and isinstance(node[key], int | float) and node[key] < 2**70:
            node[key] = rng.choice((-node[key], node[key] * 1000, node[key] * 0.3, str(node[key])))
        elif kind == 3:
            node[key] = [node[key]]
        else:
            node[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return values


def damaged_json(content: bytes, rng: random.Random) -> bytes:
    """A JSON file whose text or whose values are damaged."""
    if rng.random() < 0.2:
        return damaged_bytes(content, rng)
    return json.dumps(damaged_values(json.loads(content), rng)).encode()


def _places(values: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a document."""
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in list(items):
        yield values, key
        if isinstance(value, dict | list):
            yield from _places(value)


@contextlib.contextmanager
def no_longer_than(seconds: int):
    """Raises TimeoutError in the main thread where the body hangs."""

    def stop(*_):
        raise TimeoutError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refusal(function: Callable[[], Any], *names: Any) -> str | None:
    """None where a call goes well, and otherwise its message: a ValueError of one line with a name.

    Args:
        names: of files or folders, of which the message must have one.
    """
    try:
        with no_longer_than(60):
            function()
    except ValueError as error:
        message = str(error)
        assert type(error).__name__ in ("ValueError", "CheckpointError", "ConversionError"), error
        assert "\n" not in message.strip() or "fault" in message, message
        assert any(str(name) in message for name in names), message
        return message
    return None
