# SPDX-License-Identifier: Apache-2.0
"""Cycles of the compiler's final schedules: VLIW bundles times the trips of the loops around them.

libtpu writes a file for each kernel that it emits (`DUMP_FLAGS`). A line of it is a bundle, which
is one cycle; its depth in loops is the number of `>`:

    0x2 LB: > { %s38 = ... /* phi copy :: iteration index, stage = 0 */ }
    0x3   : > > { ... }
    0x1f  : > { %p10 = scmp.ge.s32.totalorder %s13, 4 /* loop exit test */ }

Regions under a condition count as taken on every trip, and waits for memory are not in it. Where a
kernel is one long loop with large such regions, this is far too much: a convolution of 192 channels
of a batch of 16 maps came to 23.8 million cycles, where the same in a loop nest has 1.7 (cost.py
does not take such figures). Loops that are software-pipelined run as often as their exit test says
less the stages before the last.
"""

import re
from collections.abc import Iterable
from pathlib import Path


DUMP_FLAGS = (
    "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_llo_pass_label_regex=final_bundles"
)
"""For LIBTPU_INIT_ARGS, which libtpu reads when it is loaded."""

_BUNDLE = re.compile(r"\s*(?:0x)?[0-9a-f]+\s+([A-Z]{2})?\s*:\s*((?:>\s*)*)\{(.*)")
_STAGE = re.compile(r"iteration index, stage = (\d+)")
_TRIPS = re.compile(r"scmp\.[\w.]+ [^,]*, (\d+) /\* loop exit test")
_FILE = re.compile(r"\d+-(.*)-\d+-final_bundles\.txt")


class _Loop:
    def __init__(self):
        self.cycles, self.trips, self.stages = 0, 1, 0

    def total(self) -> int:
        return self.cycles * max(1, self.trips - self.stages)


def kernel_cycles(lines: Iterable[str]) -> int:
    """Cycles of one kernel, from the lines of its file."""
    loops = [_Loop()]

    def leave(depth: int) -> None:
        while len(loops) > depth + 1:
            total = loops.pop().total()
            loops[-1].cycles += total

    for line in lines:
        found = _BUNDLE.match(line)
        if not found:
            continue
        tag, arrows, body = found.groups()
        depth = arrows.count(">")
        if body.strip().startswith("}"):  # an empty bundle: its depth is not printed
            depth = len(loops) - 1
        # A loop that begins where another of the same depth has just ended.
        leave(depth - 1 if tag == "LB" and depth == len(loops) - 1 and depth else depth)
        while len(loops) <= depth:
            loops.append(_Loop())
        loop = loops[-1]
        loop.cycles += 1
        loop.stages = max([loop.stages, *(int(stage) for stage in _STAGE.findall(body))])
        if trips := _TRIPS.search(body):
            loop.trips = int(trips[1])
    leave(0)
    return loops[0].total()


def read_schedules(folder: Path) -> dict[str, int]:
    """Kernel (the name of its instruction) -> cycles, of a folder that libtpu dumped into."""
    cycles = {}
    for path in sorted(folder.glob("*-final_bundles.txt")):
        name = _FILE.fullmatch(path.name)
        if name and "schedule-analysis" not in path.name:
            with path.open(errors="replace") as lines:
                cycles[name[1]] = kernel_cycles(lines)
    return cycles
