# SPDX-License-Identifier: Apache-2.0
"""TPU chips and slices of them, as the compiler sees them.

Peak, HBM size and bandwidth are those of the pages of
https://cloud.google.com/tpu/docs/system-architecture-tpu-vm. `usable` is what libtpu 0.0.42.1 calls
"available HBM" when it refuses a program. The clock is the one whose cycles its schedules count.
`link` is one direction of a link between two chips, from
https://jax-ml.github.io/scaling-book/tpus.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any


GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One JAX device; for v4 and v5p that is a chip with both of its cores.

    Attributes:
        name: as in a topology, such as "v5e".
        clock: cycles per second of the cores.
        peak: dense bfloat16 FLOP/s.
        bandwidth: of HBM, bytes per second.
        hbm: bytes, as sold.
        usable: bytes that the compiler gives to a program.
        link: bytes per second to a neighbour.
        dimensions: of a slice's shape.
        host: chips of a host along each dimension, in slices that span several.
        options: further arguments of `get_topology_desc`.
    """

    name: str
    clock: float
    peak: float
    bandwidth: float
    hbm: float
    usable: float
    link: float
    dimensions: int
    host: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)


# Without "megacore" a JAX device of a v4 would be half a chip.
_MEGACORE = {"chip_config_name": "megacore"}
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 1.05e9, 275e12, 1.228e12, 32 * GIB, 30.75 * GIB, 45e9, 3, (2, 2, 1), _MEGACORE),
        Chip("v5e", 1.5e9, 197e12, 0.819e12, 16 * GIB, 15.75 * GIB, 45e9, 2, (2, 2)),
        Chip("v5p", 1.75e9, 459e12, 2.765e12, 95 * GIB, 95.74 * GIB, 90e9, 3, (2, 2, 1), _MEGACORE),
        Chip("v6e", 1.75e9, 918e12, 1.64e12, 32 * GIB, 31.25 * GIB, 90e9, 2, (2, 2)),
    )
}

_BY_KIND = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls so; by the whole name, for "TPU v4 lite" is another than "TPU v4"."""
    return CHIPS.get(_BY_KIND.get(device_kind))


@dataclass(frozen=True)
class Slice:
    """Chips in a grid, such as "v5e:2x4"."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def devices(self) -> list:
        """The JAX devices of a slice that need not exist; loads libtpu."""
        from jax.experimental import topologies

        # A host has a part of a slice smaller than itself.
        host = [min(pair) for pair in zip(self.chip.host, self.shape, strict=True)]
        description = topologies.get_topology_desc(
            platform="tpu",
            topology_name=self.name,
            chips_per_host_bounds=[*host, 1, 1][:3],
            **self.chip.options,
        )
        return list(description.devices)


def parse_slice(text: str) -> Slice:
    """The slice that "v5e:2x4" names.

    Raises:
        ValueError: one sentence: no such chip, or no such shape.
    """
    name, _, shape = text.strip().lower().partition(":")
    chip = CHIPS.get(name)
    example = "v5e:2x4" if chip is None or chip.dimensions == 2 else f"{name}:2x2x1"
    if chip is None:
        raise ValueError(
            f"--topology {text!r}: there is no chip {name!r}; known are {', '.join(CHIPS)} "
            f"(for example {example})."
        )
    sides = (
        tuple(int(side) for side in shape.split("x")) if re.fullmatch(r"\d+(x\d+)*", shape) else ()
    )
    if len(sides) != chip.dimensions or 0 in sides:
        raise ValueError(
            f"--topology {text!r}: the shape of a {name} slice has {chip.dimensions} sides of 1 or "
            f"more chips, for example {example}."
        )
    uneven = [s for s, h in zip(sides, chip.host, strict=True) if s > h and s % h]
    if uneven:
        raise ValueError(
            f"--topology {text!r}: hosts have {'x'.join(map(str, chip.host))} chips, which do not "
            f"make up a side of {uneven[0]}."
        )
    return Slice(chip, sides)
