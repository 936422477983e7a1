# SPDX-License-Identifier: Apache-2.0
"""Audit a data set: counts, checksums, duplicates, unreadable images, its manifest.

  k3jax verify pictures
  k3jax verify pictures --repair

The exit code is 0 if the data set is complete and undamaged, otherwise 1. --repair generates again
what is damaged or missing, bit for bit. Failed samples are counted, with their reasons; they do not
count as damage.
"""

import argparse
import dataclasses
import json

from k3jax.cli.environment import require
from k3jax.cli.regenerate import add_sources, devices_by


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("output", metavar="OUT", help="folder or address of the data set")
    add("--repair", action="store_true", help="generate again what is damaged or missing")
    add(
        "--retry-failed", action="store_true", help="with --repair: also shards with failed samples"
    )
    add("--quick", action="store_true", help="compare checksums, decode no images")
    add("--json", action="store_true", help="as JSON")
    add_sources(add)


def run(args: argparse.Namespace) -> int:
    require("synth")
    from k3jax.synthesis.audit import audit
    from k3jax.synthesis.run_manifest import read_manifest
    from k3jax.synthesis.store import store_at

    store = store_at(args.output)
    manifest = read_manifest(store)
    result = audit(store, manifest, decode=not args.quick, progress=args.progress)
    todo = result.to_remake
    if args.retry_failed:
        todo = sorted({*todo, *_with_accidents(store, manifest)})
    if args.repair and todo:
        print(f"making {len(todo)} shards again: {_ranges(todo)}")
        code = _repair(args, store, manifest, todo)
        if code:
            return code
        result = audit(store, manifest, decode=not args.quick, progress=args.progress)
    if args.json:
        values = {**dataclasses.asdict(result), "remake": result.to_remake, "good": result.is_good}
        print(json.dumps(values, indent=2))
    else:
        print("\n".join(_lines(str(store), result, args)))
    return 0 if result.is_good else 1


def _repair(args, store, manifest, shards) -> int:
    from k3jax.synthesis.regeneration import StoredSamples, repair, weights_of
    from k3jax.synthesis.run import RunOptions

    weights = weights_of(manifest, args.checkpoint, args.lora)
    samples = StoredSamples(store, manifest, weights.checkpoint, args.prompts)
    options = RunOptions(progress=args.progress, image_folder=manifest.found_at["images"])
    return repair(store, manifest, weights, samples, shards, devices_by(args), options)


def _with_accidents(store, manifest) -> list[int]:
    """Shards with samples that failed although their line was good."""
    from k3jax.synthesis.metadata import OK, finished_shards, read_sidecar

    found = []
    for shard in sorted(finished_shards(store, manifest.layout)):
        try:
            rows = read_sidecar(store, manifest.layout.sidecar(shard), ["status", "prompt"]).rows
        except ValueError:
            continue
        if any(row["status"] != OK and row["prompt"] is not None for row in rows):
            found.append(shard)
    return found


def _lines(name: str, result, args) -> list[str]:
    failed = sum(result.failed.values())
    lines = [
        f"{name}: {result.images:,} images, {failed:,} failed samples, of {result.samples:,}; "
        f"{result.shards - len(result.missing)} of {result.shards} shards finished"
    ]
    lines += [f"  failed: {n:,} x {why}" for why, n in list(result.failed.items())[:10]]
    if len(result.made_on) > 1:
        for made_on, shards in result.made_on:
            mesh = ", ".join(f"{axis}={size}" for axis, size in made_on["mesh"].items())
            lines.append(
                f"  made with {made_on['images_per_device']} images per device ({mesh}) on "
                f"{made_on['device']}: shards {_ranges(shards)}"
            )
    if result.missing:
        lines.append(f"  missing: shards {_ranges(result.missing)}")
    for faults in result.damaged.values():
        lines += [f"  damaged: {fault}" for fault in faults]
    for sample, shards in list(result.duplicates.items())[:10]:
        lines.append(f"  twice: {sample} in shards {_ranges(shards)}")
    lines += [f"  unknown: {file} belongs to nothing; remove it" for file in result.unknown]
    if result.is_good:
        how = "checksums" if args.quick else "checksums and images"
        lines.append(f"  All {how} are as they should be.")
    elif result.to_remake:
        lines.append(
            f"  To be made again: shards {_ranges(result.to_remake)} (k3jax verify {name} --repair)"
        )
    return lines


def _ranges(numbers) -> str:
    """'0-3, 7' of 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in parts[:20]]
    return ", ".join([*shown, "..."] if len(parts) > 20 else shown)
