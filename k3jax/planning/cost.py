# SPDX-License-Identifier: Apache-2.0
"""What a compiled TPU program costs: kernels, transfers and collectives, walked in their order.

Each kernel takes the longest of: its scheduled cycles, its bytes from and to HBM at full bandwidth,
its FLOPs at peak. Without schedules the last two alone are the *floor*. Prefetches (copy-start to
copy-done) run beside the kernels in a queue of their own at HBM bandwidth, and collectives in one
at the bandwidth of a ring over one axis of the slice; what waits for them too early adds a stall.
The body of a loop counts as often as it runs, the dearest branch of a condition once.

How far to trust it. The schedule figure came to 113 to 120 ms for a step of SDXL's U-Net (CFG
pair, 13.91 TFLOP) on a v5e, against 107 to 109 ms published, and to 97.7 ms on a v4 against about
103: it is quoted with +-15 %. The v6e has no valid calibration (53 ms against about 34 of another
program and other flags), and collectives have none on any chip. XLA's own `estimated_cycles` are
about twice what such steps take, so they are used only where a schedule is misread
(`MISREAD`). Starting a kernel is free here, so programs of very small kernels look faster than
they are.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from k3jax.planning.chips import Chip
from k3jax.planning.collectives import (
    RING,
    Collective,
    CollectivePart,
    channel_spans,
    find_collective,
    payload,
    ring_passes,
)
from k3jax.planning.flops import kernel_flops
from k3jax.planning.hlo import BYTES, Computation, Instruction, Module, parse_arrays


Figure = Literal["schedule", "floor"]

FREE = set(
    "parameter get-tuple-element tuple bitcast constant after-all partition-id replica-id "
    "opt-barrier iota domain add-dependency".split()
)
"""Instructions that are no work."""

MISREAD = 4
"""A schedule of more than this times XLA's own estimate is of the form that cannot be read (see
schedules.py), and the estimate counts instead."""


Kind = Literal["products", "attention", "reductions", "element-wise", "copies"]
"""products: matrix products and convolutions, with all that is fused to them. attention: Pallas
kernels; we have no others. copies: the same values elsewhere or in another order."""

MOVES = frozenset(
    "bitcast broadcast concatenate constant copy dynamic-slice dynamic-update-slice fusion gather "
    "get-tuple-element iota pad parameter reshape reverse slice transpose tuple".split()
)


@dataclass(frozen=True)
class Cost:
    """Of one run of a program on each chip, in bytes, FLOPs and seconds.

    Attributes:
        seconds: the time, by `figure`.
        figure: "schedule" where the compiler's schedules were there, else "floor".
        floor: the lower bound in any case.
        flops: of matrix products and convolutions, those that land on data.
        hbm_bytes: read and written by kernels and prefetches.
        scheduled: share of the kernels' time that is by schedules, and not by XLA's estimates or
            the lower bound.
        stalls: seconds that kernels wait for prefetches and collectives.
        kernels: how many run.
        unknown_loops: loops whose number of trips is unknown; they count once.
        kinds: kind of kernel (`Kind`) -> its share of the seconds; what is left is waiting.
    """

    seconds: float
    figure: Figure
    floor: float
    flops: float
    hbm_bytes: float
    scheduled: float
    stalls: float
    kernels: int
    unknown_loops: int
    collectives: tuple[Collective, ...] = ()
    kinds: Mapping[str, float] = field(default_factory=dict)

    @property
    def waiting(self) -> float:
        """Seconds in which no kernel runs."""
        return max(0.0, self.seconds - sum(self.kinds.values()))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Cost":
        collectives = tuple(Collective(**c) for c in values["collectives"])
        return cls(**{**values, "collectives": collectives})


def estimate(module: Module, chip: Chip, cycles: Mapping[str, int] | None = None) -> Cost:
    """The cost of a program.

    Args:
        cycles: kernel -> cycles, from `schedules.read_schedules`; None or empty: the floor.
    """
    floor = _Walk(module, chip, _no_cycles)
    floor.run()
    found = floor
    if cycles:
        found = _Walk(module, chip, _matcher(module, cycles))
        found.run()
    return Cost(
        seconds=found.seconds,
        figure="schedule" if cycles else "floor",
        floor=floor.seconds,
        flops=found.total["flops"],
        hbm_bytes=found.total["hbm"],
        scheduled=found.total["scheduled"] / max(found.total["kernels"], 1e-30),
        stalls=found.total["stalls"],
        kernels=int(found.total["count"]),
        unknown_loops=int(found.total["unknown"]),
        collectives=tuple(
            Collective(kind, int(sums["count"]), sums["bytes"])
            for kind, sums in sorted(found.collectives.items())
        ),
        kinds=dict(found.kinds),
    )


@dataclass
class _Clock:
    """Seconds since a computation began, and until when the two queues are busy."""

    now: float = 0.0
    memory: float = 0.0
    network: float = 0.0
    ready: dict[str, float] = field(default_factory=dict)


class _Walk:
    """Sums over a program; `total` is weighted by how often each instruction runs."""

    def __init__(self, module: Module, chip: Chip, cycles_of):
        self.module, self.chip, self.cycles_of = module, chip, cycles_of
        self.total: Counter[str] = Counter()
        self.collectives: dict[str, Counter[str]] = defaultdict(Counter)
        self.kinds: Counter[str] = Counter()
        self.seconds = 0.0

    def run(self) -> None:
        seconds = self.walk(self.module.computations[self.module.entry], 1)
        # Kernels and prefetches share one memory.
        self.seconds = max(seconds, self.total["hbm"] / self.chip.bandwidth)

    def walk(self, computation: Computation, times: int) -> float:
        """Seconds of one run of a computation that runs `times` times."""
        clock = _Clock()
        for instruction in computation.instructions:
            self.step(instruction, computation, times, clock)
        return clock.now

    def step(self, i: Instruction, inside: Computation, times: int, clock: _Clock) -> None:
        phase = i.op.rpartition("-")[2] if i.op.endswith(("-start", "-done")) else ""
        if i.op in FREE or i.op.endswith("-update"):
            return
        if phase == "done":
            stall = max(0.0, clock.ready.get(i.operands[0] if i.operands else "", 0.0) - clock.now)
            self.total["stalls"] += times * stall
            clock.now += stall
        elif part := find_collective(self.module, i, inside):
            self.communicate(i, part, inside, times, clock)
        elif phase == "start":
            size = self.prefetched(i)
            self.total["hbm"] += times * size
            clock.memory = max(clock.memory, clock.now) + size / self.chip.bandwidth
            clock.ready[i.name] = clock.memory
        elif i.op == "while":
            trips = self.trips(i)
            body = self.module.computations[i.attribute(r"body=%?([\w.\-]+)")]
            clock.now += trips * self.walk(body, times * trips)
        elif i.op in ("call", "conditional"):
            clock.now += self.dearest(i, times)
        else:
            clock.now += self.kernel(i, inside, times)

    def kernel(self, i: Instruction, inside: Computation, times: int) -> float:
        flops, hbm = kernel_flops(self.module, i, inside), self.module.hbm_bytes(i, inside)
        if i.op == "reshape" or "ConcatBitcast" in i.attributes:
            hbm = 0.0  # only another view, unless a kernel was scheduled for it
        seconds = max(flops / self.chip.peak, hbm / self.chip.bandwidth)
        cycles = self.cycles_of(i, inside)
        if cycles is not None:
            estimated = int(i.attribute(r'"estimated_cycles":"(\d+)"') or 0)
            misread = 0 < MISREAD * estimated < cycles
            seconds = max(seconds, (estimated if misread else cycles) / self.chip.clock)
            if not misread:
                self.total["scheduled"] += times * seconds
        self.kinds[kind_of(self.module, i, flops)] += times * seconds
        self.total.update(
            count=times, flops=times * flops, hbm=times * hbm, kernels=times * seconds
        )
        return seconds

    def communicate(
        self, i: Instruction, part: CollectivePart, inside: Computation, times: int, clock: _Clock
    ) -> None:
        """An instruction with a collective: its start, its end, a kernel fused to it, or all."""
        first, last = channel_spans(self.module, inside)[part.channel]
        if i.name == first:
            clock.network = max(clock.network, clock.now) + self.collective(part, times)
            clock.ready[part.channel] = clock.ready[i.name] = clock.network
        if i.name not in (first, last) or kernel_flops(self.module, i, inside):
            clock.now += self.kernel(i, inside, times)
        if i.name == last and not i.op.endswith("-start"):
            stall = max(0.0, clock.ready[part.channel] - clock.now)
            self.total["stalls"] += times * stall
            clock.now += stall

    def collective(self, part: CollectivePart, times: int) -> float:
        size = payload(part.instruction, part.inside)
        self.collectives[part.kind].update(count=times, bytes=times * size)
        return ring_passes(part.instruction, part.kind) * size / (RING * self.chip.link)

    def prefetched(self, i: Instruction) -> float:
        """Bytes that a transfer between HBM and VMEM moves: the arrays in VMEM, if any."""
        sizes = [a.bytes for a in i.arrays if not a.in_hbm and a.bytes > BYTES["u32"]]
        return max(sizes) if sizes else sum(a.bytes for a in i.arrays) / 2

    def trips(self, i: Instruction) -> int:
        """Of a loop that counts from 0 to a constant."""
        known = i.attribute(r'known_trip_count":\{"n":"(\d+)"')
        if known:
            return int(known)
        condition = self.module.computations[i.attribute(r"condition=%?([\w.\-]+)")]
        limits = [c.arguments for c in condition.instructions if c.op == "constant"]
        if len(limits) == 1 and limits[0].isdigit():
            return int(limits[0])
        self.total["unknown"] += 1
        return 1

    def dearest(self, i: Instruction, times: int) -> float:
        """Walks the branch that takes longest."""
        branches = [self.module.computations[name] for name in i.called]
        costs = [_Walk(self.module, self.chip, self.cycles_of) for _ in branches]
        seconds = [walk.walk(branch, 1) for walk, branch in zip(costs, branches, strict=True)]
        if not seconds:
            return 0.0
        return self.walk(branches[seconds.index(max(seconds))], times)


def _no_cycles(i: Instruction, inside: Computation) -> None:
    return None


def _matcher(module: Module, cycles: Mapping[str, int]):
    """The scheduled cycles of a kernel. Of equal kernels libtpu emits, and dumps, only one."""
    exact: dict[str, int] = {}
    similar: dict[tuple, int] = {}

    def alike(i: Instruction, inside: Computation) -> tuple:
        shapes = tuple((a.dtype, a.shape) for a in parse_arrays(i.type))
        return i.op, shapes, kernel_flops(module, i, inside)

    for computation in module.computations.values():
        for i in computation.instructions:
            if i.name in cycles:
                exact.setdefault(module.identity(i, computation), cycles[i.name])
                similar.setdefault(alike(i, computation), cycles[i.name])

    def find(i: Instruction, inside: Computation) -> int | None:
        cycles_found = cycles.get(i.name, exact.get(module.identity(i, inside)))
        return similar.get(alike(i, inside)) if cycles_found is None else cycles_found

    return find


def kind_of(module: Module, instruction: Instruction, flops: float) -> Kind:
    """Of a kernel with that many FLOPs of matrix products and convolutions."""
    if instruction.op == "custom-call" and "tpu_custom_call" in instruction.attributes:
        return "attention"
    if flops:
        return "products"
    operations = {instruction.op}
    for name in instruction.called:
        operations |= module.operations(name)
    if operations & {"reduce", "reduce-window"}:
        return "reductions"
    # A pad is put over another map by the larger of the two.
    moves = MOVES | {"maximum"} if "pad" in operations else MOVES
    return "copies" if operations <= moves else "element-wise"
