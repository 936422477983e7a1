#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measure several cases on the devices of this machine, one JSON line per case.

  python launch/benchmark.py --config kandinsky3 --batches 1,2,4,8 | tee v5e.jsonl
  python launch/benchmark.py --config flash --repeats 20 --programs denoise,decode

For each batch size (images on each device): the text encoder, a denoising step with and without
guidance, the decoder, and from these the latency and throughput of whole images. On TPUs, or with
--topology, each line also has the plan of `k3jax plan` (pip install -e '.[tpu]'). All other flags
are those of `k3jax benchmark`. A case that fails or does not fit is a line with "error".
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


try:
    from k3jax.cli.main import parse
except ModuleNotFoundError:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from k3jax.cli.main import parse

PROGRAMS = ("encode", "denoise", "decode")
WITHOUT = ("--guidance-scale", "0")
SHAPES = {"v5e": {1: "1x1", 4: "2x2", 8: "2x4"}, "v4": {1: "1x1x1", 4: "2x2x1"}}
SHAPES |= {"v6e": SHAPES["v5e"], "v5p": SHAPES["v4"]}
"""Chip -> devices of one host -> their grid."""


class Failed(Exception):
    """A case that could not be measured, with the reason."""


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args, rest = _arguments(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        print(f"benchmark.py: error: {error}", file=sys.stderr)
        return 2
    failed = False
    for line in cases(args, rest):
        failed |= "error" in line
        print(json.dumps(line), flush=True)
    return int(failed)


def cases(args: argparse.Namespace, rest: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A line for each case, as soon as it is measured."""
    for batch in args.batches:
        measured: dict[str, dict[str, Any]] = {}
        for program in args.programs:
            for guided in (True, False) if program == "denoise" else (True,):
                words = [*rest, "--batch", str(batch), "--programs", program]
                words += () if guided else WITHOUT
                case = {"batch_per_device": batch}
                try:
                    lines = _benchmark([*words, "--repeats", str(args.repeats)])
                except Failed as error:
                    name = program if guided else "denoise_plain"
                    yield {"case": name, **case, "error": str(error)}
                    continue
                for line in lines[:-1]:
                    # Flash has no guidance: both are one program, which is measured once.
                    if line["case"] not in measured:
                        measured[line["case"]] = line
                        yield line | _rates(line) | _plan(args, line, words)
                if program == "denoise":
                    measured["guided" if guided else "plain"] = lines[-1]
        yield from _whole_images(args, measured)


def _whole_images(args, measured) -> Iterator[dict[str, Any]]:
    """Sums over the programs of a batch, where all of them were measured."""
    for name in ("guided", "plain"):
        total = measured.get(name)
        if total is None or not {"encode", "decode"} <= measured.keys():
            continue
        if name == "plain" and total["unet_passes"] == measured["guided"]["unet_passes"]:
            continue  # a sampler without guidance
        parts = total["seconds"], *(measured[case]["seconds"] for case in ("encode", "decode"))
        line = {**total, "case": f"images_{name}", "seconds": sum(parts)}
        line["of"] = ["encode", *total["of"], "decode"]
        line["images_per_second_per_device"] = line["images"] / sum(parts) / line["devices"]
        yield line | _rates(line)


def _rates(line: dict[str, Any]) -> dict[str, float]:
    return {"images_per_second": line["images"] / line["seconds"]}


def _benchmark(words: Sequence[str]) -> list[dict[str, Any]]:
    """Runs `k3jax benchmark` in its own process, so that the peak memory is that of one case."""
    out, err, code, peak = _run(["benchmark", *words])
    if code != 0:
        raise Failed(_last(err, code))
    lines = [json.loads(line) for line in out.splitlines()]
    return [line | {"host_peak_bytes": peak} for line in lines]


def _plan(args, line, words: Sequence[str]) -> dict[str, Any]:
    """The plan of the case, and the measured time divided by the planned time."""
    topology = args.topology or _topology(line)
    if topology is None:
        return {}
    command = ["plan", "--topology", topology, "--json", "--no-progress", *words]
    out, err, code, _ = _run(command, JAX_PLATFORMS="cpu")
    if code != 0:
        return {"plan": {"topology": topology, "error": _last(err, code)}}
    values = json.loads(out)
    program = next(p for p in values["programs"] if p["name"] == line["case"])
    plan = {
        "topology": topology,
        "seconds": program["seconds"],
        "figure": program["figure"],
        "peak_bytes": program["memory"]["peak"],
        "share_of_peak_flops": program["share_of_peak"],
        "compiler": values["compiler"],
    }
    if line["platform"] != "tpu":
        return {"plan": plan}
    return {"plan": plan, "measured_by_plan": line["seconds"] / program["seconds"]}


def _topology(line: dict[str, Any]) -> str | None:
    """The slice that was measured; None for other devices, and for several hosts."""
    from k3jax.planning.chips import chip_of

    chip = chip_of(line["device"])
    shape = None if chip is None else SHAPES[chip.name].get(line["devices"])
    return None if shape is None else f"{chip.name}:{shape}"


def _run(words: Sequence[str], **variables: str) -> tuple[str, str, int, int]:
    """(stdout, stderr, exit code, peak of host memory in bytes) of a k3jax command."""
    root = str(Path(sys.modules[parse.__module__].__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "k3jax", *words],
            env={**os.environ, "PYTHONPATH": path, **variables},
            stdout=out,
            stderr=err,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        for file in (out, err):
            file.seek(0)
        kilobyte = 1 if sys.platform == "darwin" else 1024
        return out.read(), err.read(), process.returncode, usage.ru_maxrss * kilobyte


def _last(err: str, code: int) -> str:
    lines = err.strip().splitlines()
    return lines[-1].removeprefix("k3jax: error: ") if lines else f"it ended with code {code}"


def _arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments of this script, and those for `k3jax benchmark`.

    Raises:
        ValueError: one sentence.
    """
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    add("--batches", default="1,2,4", metavar="LIST", help="images on each device (1,2,4)")
    add("--programs", default=",".join(PROGRAMS), metavar="LIST", help="some of %(default)s")
    add("--repeats", default="5", metavar="N", help="runs; the median counts (5)")
    add("--topology", metavar="CHIP:SHAPE", help="also plan for this slice")
    args, rest = parser.parse_known_args(argv)
    args.batches, args.repeats = _numbers("--batches", args.batches), args.repeats.strip()
    _numbers("--repeats", args.repeats)
    args.programs = tuple(args.programs.replace(" ", "").split(","))
    if unknown := set(args.programs) - set(PROGRAMS):
        raise ValueError(f"--programs {sorted(unknown)[0]!r}: choose from {', '.join(PROGRAMS)}.")
    if any(word.split("=")[0] in ("--batch", "--guidance-scale") for word in rest):
        raise ValueError("--batch and --guidance-scale are set for each case: use --batches.")
    parse(["benchmark", *rest])
    if args.topology is not None:
        from k3jax.planning.chips import parse_slice
        from k3jax.planning.compiler import check_libtpu

        parse_slice(args.topology)
        try:
            check_libtpu()
        except ImportError as error:
            raise ValueError(str(error)) from None
    return args, rest


def _numbers(flag: str, text: str) -> list[int]:
    words = text.replace(" ", "").split(",")
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise ValueError(f"{flag} {text!r}: give whole numbers of 1 or more, such as 1,2,4.")
    return [int(word) for word in words]


if __name__ == "__main__":
    sys.exit(main())
