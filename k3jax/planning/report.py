# SPDX-License-Identifier: Apache-2.0
"""A plan as text and as JSON."""

import dataclasses
from typing import Any, get_args

from k3jax.planning.compiler import size_text
from k3jax.planning.cost import Kind
from k3jax.planning.plan import Plan, Program
from k3jax.planning.workload import TITLES


CAVEATS = {
    "schedule": (
        "Time is by the compiler's schedule: of each kernel the longest of its VLIW cycles, its "
        "HBM traffic and its FLOPs. Trust it to +-15 %: a step of SDXL's U-Net came to 113-120 ms "
        "on a v5e (published: 107-109) and 97.7 ms on a v4 (about 103)."
    ),
    "floor": (
        "Time is a floor: of each kernel the longer of its HBM traffic and its FLOPs, because the "
        "compiler dumped no schedule. Real steps take longer."
    ),
    "v6e": "The v6e has no valid calibration (its schedule said 53 ms where 34 are published).",
    "collectives": "Collectives are timed at the links' full bandwidth, and are not calibrated.",
    "left out": (
        "Not counted: compilation, loading, the host's own work, and the small programs for "
        "context and first noise. Nothing here has run on a TPU."
    ),
}


def notes(plan: Plan) -> list[str]:
    """What the numbers rest on, as sentences."""
    options, figures = plan.options, {p.compiled.cost.figure for p in plan.programs}
    found = [CAVEATS[figure] for figure in ("schedule", "floor") if figure in figures]
    if options.where.chip.name == "v6e":
        found.append(CAVEATS["v6e"])
    if any(p.compiled.cost.collectives for p in plan.programs):
        found.append(CAVEATS["collectives"])
    if any(p.compiled.cost.unknown_loops for p in plan.programs):
        found.append("A loop with an unknown number of trips was counted once.")
    found.append(CAVEATS["left out"])
    return found


def to_json(plan: Plan) -> dict[str, Any]:
    """One object; bytes, seconds, FLOPs and dollars, all per chip unless named otherwise."""
    options, chip = plan.options, plan.options.where.chip
    return {
        "topology": options.where.name,
        "chips": options.where.count,
        "chip": {
            "name": chip.name,
            "hbm_usable": int(chip.usable),
            "hbm_bandwidth": chip.bandwidth,
            "peak_flops": chip.peak,
        },
        "batch_per_chip": options.batch,
        "height": options.size[0],
        "width": options.size[1],
        "dtype": options.load.dtype,
        "param_dtype": options.param_dtype,
        "sampler": options.sampler.name,
        "guidance_scale": options.sampler.guidance_scale,
        "guidance_interval": options.call.guidance_interval,
        "evaluations": {
            "steps": plan.evaluations.steps,
            "guided": plan.evaluations.guided,
            "plain": plan.evaluations.plain,
            "unet_passes": plan.evaluations.passes,
        },
        "programs": [_program_json(program, chip) for program in plan.programs],
        "weights_fit_together": plan.together,
        "price_per_chip_hour": options.price,
        "totals": dataclasses.asdict(plan.totals),
        "compiler": plan.programs[0].compiled.compiler,
        "notes": notes(plan),
    }


def to_lines(plan: Plan) -> list[str]:
    """The same for people."""
    options, where = plan.options, plan.options.where
    height, width = options.size
    chips = f"{where.count} chip{'s' * (where.count > 1)} of {size_text(where.chip.usable)}"
    lines = [
        f"{where.name}: {chips}, {options.batch} image{'s' * (options.batch > 1)} per chip, "
        f"{plan.totals.images} at a time, {width} x {height}, {options.load.dtype}",
        "",
        *_table(plan),
        "",
        *_total_lines(plan),
        "",
        f"By {plan.programs[0].compiled.compiler}.",
        *notes(plan),
    ]
    return lines


def _program_json(program: Program, chip) -> dict[str, Any]:
    memory, cost = program.compiled.memory, program.compiled.cost
    return {
        "name": program.name,
        "mesh": program.work.mesh,
        "runs": program.runs,
        "memory": {
            **dataclasses.asdict(memory),
            "other_weights": program.other_weights,
            "peak": program.memory,
            "share_of_hbm": program.memory / chip.usable,
        },
        "flops": cost.flops,
        "hbm_bytes": cost.hbm_bytes,
        "seconds": cost.seconds,
        "figure": cost.figure,
        "floor_seconds": cost.floor,
        "seconds_by_kind": {**cost.kinds, "waiting": cost.waiting},
        "scheduled_share": cost.scheduled,
        "stall_seconds": cost.stalls,
        "share_of_peak": _share(cost, chip),
        "collectives": [dataclasses.asdict(c) for c in cost.collectives],
        "compile_seconds": program.compiled.seconds,
    }


def _share(cost, chip) -> float:
    return cost.flops / chip.peak / cost.seconds if cost.seconds else 0.0


def _table(plan: Plan) -> list[str]:
    chip = plan.options.where.chip
    columns = [_column(program, chip) for program in plan.programs]
    head = [TITLES[program.name] for program in plan.programs]
    rows = [("", *head)]
    rows += [(label, *(column[label] for column in columns)) for label in columns[0]]
    kinds = sorted({c.kind for p in plan.programs for c in p.compiled.cost.collectives})
    for kind in kinds or [None]:
        cells = [_collective(program, kind) for program in plan.programs]
        rows.append((f"{kind or 'collectives'}", *cells))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        (
            f"{row[0]:<{widths[0]}}"
            + "".join(f"  {c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
        ).rstrip()
        for row in rows
    ]


def _column(program: Program, chip) -> dict[str, str]:
    memory, cost = program.compiled.memory, program.compiled.cost
    mesh = [f"{axis}={size}" for axis, size in program.work.mesh.items() if size > 1]
    return {
        "mesh": ",".join(mesh) or "one chip",
        "runs per batch": str(program.runs),
        "arguments": size_text(memory.arguments),
        "temporaries": size_text(memory.temporaries),
        "outputs and code": size_text(memory.outputs + memory.code),
        "other weights": size_text(program.other_weights),
        "peak on a chip": size_text(program.memory),
        "of its HBM": f"{100 * program.memory / chip.usable:.0f} %",
        "TFLOP": f"{cost.flops / 1e12:.3g}",
        "HBM traffic": size_text(cost.hbm_bytes),
        f"ms by the {cost.figure}": f"{cost.seconds * 1e3:.3g}",
        **{f"  {kind}": f"{cost.kinds.get(kind, 0.0) * 1e3:.3g}" for kind in get_args(Kind)},
        "  waiting": f"{cost.waiting * 1e3:.3g}",
        "ms at least": f"{cost.floor * 1e3:.3g}",
        "share of peak": f"{100 * _share(cost, chip):.0f} %",
        "compiled in": f"{program.compiled.seconds:.0f} s",
    }


def _collective(program: Program, kind: str | None) -> str:
    for collective in program.compiled.cost.collectives:
        if collective.kind == kind:
            return f"{collective.count}, {size_text(collective.bytes)}"
    return "none"


def _total_lines(plan: Plan) -> list[str]:
    options, totals, counts = plan.options, plan.totals, plan.evaluations
    parts = {"encode": totals.encode, "denoise": totals.denoise, "decode": totals.decode}
    split = ", ".join(f"{name} {parts[name]:.3g} s" for name in options.parts)
    lines = [
        f"{counts.steps} steps of {options.sampler.name}, {counts.guided} with guidance and "
        f"{counts.plain} without: {counts.passes} U-Net passes an image",
        f"{totals.seconds:.3g} s for a batch of {totals.images} ({split})",
        f"{totals.images_per_second_per_chip:.3g} images/s/chip, "
        f"{100 * totals.share_of_peak:.0f} % of peak",
        f"{totals.speed_up:.3g} times as fast as {totals.baseline}",
    ]
    if totals.dollars_per_1000 is not None:
        lines.append(
            f"${totals.dollars_per_1000:.3g} per 1,000 images at ${options.price:g} a chip-hour"
        )
    missing = [
        TITLES[part] for part in ("encode", "denoise", "decode") if part not in options.parts
    ]
    if missing:
        lines.append(f"Left out of all totals: {', '.join(missing)}.")
    if plan.encoder_split:
        lines.append(
            "The text encoder's weights do not fit one chip: it is planned on a mesh of its own, "
            "before the U-Net is loaded."
        )
    elif plan.together is not None:
        lines.append(
            "All weights fit the chips together."
            if plan.together
            else "The weights do not fit together: encode first (`k3jax synthesize --phases`)."
        )
    return lines
