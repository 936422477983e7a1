# SPDX-License-Identifier: Apache-2.0
"""Print the contents of a checkpoint, and check its files.

  k3jax info weights/kandinsky3 --verify
  k3jax info weights/flash --config flash

With --config, the architecture is compared with that of the config. Without DIR, this prints the
config's own checkpoint; if that does not exist, the sizes of a model with the config.
"""

import argparse
import json
import math
from typing import Any

from k3jax.cli.run_config import architecture_differences, build, collect
from k3jax.config import ModelConfig, to_dict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="DIR", nargs="?", help="a checkpoint of k3jax")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="check all files (1 s per 3 GB); the exit code is 1 if one is missing or changed",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with the whole config")


def run(args: argparse.Namespace) -> int:
    values = collect(args.config, args.overrides, {"checkpoint": args.checkpoint})
    path = values.get("checkpoint")
    if path is None and not values.get("model"):
        raise ValueError("give a checkpoint, or --config NAME.")

    from k3jax.checkpoints.format import as_path, read_checkpoint

    faults = []
    if path is None or (args.checkpoint is None and not as_path(path).exists()):
        if args.verify:
            raise ValueError(
                f"there is no checkpoint to verify{'' if path is None else f' at {path}'}."
            )
        described = _of_config(build(values).model)
    else:
        if args.verify:
            from k3jax.checkpoints.restore import verify

            faults = verify(path, progress=args.progress)
        described = {} if faults else _of_checkpoint(read_checkpoint(path), values)
        if args.verify:
            described["faults"] = faults
    if args.json:
        print(json.dumps(described, indent=2))
    elif faults:
        print("\n".join([f"{path} is damaged:", *(f"  {fault}" for fault in faults)]))
    else:
        print("\n".join(_lines(described)))
    return 1 if faults else 0


def _of_checkpoint(checkpoint, values: dict[str, Any]) -> dict[str, Any]:
    """The contents of a checkpoint; a ValueError if the config has another architecture."""
    from k3jax.checkpoints.manifest import component_files, read_manifest
    from k3jax.checkpoints.restore import leaf_shapes

    model = build(values, checkpoint.config).model
    differences = architecture_differences(checkpoint.config, model)
    if differences:
        raise ValueError(
            f"{checkpoint.path} is of another architecture than the config: {differences}."
        )
    components = {}
    for name, folder in checkpoint.component_paths.items():
        arrays = leaf_shapes(checkpoint, name).values()
        counts: dict[str, int] = {}
        for array in arrays:
            dtype = str(array.dtype)
            counts[dtype] = counts.get(dtype, 0) + math.prod(array.shape)
        files = component_files(read_manifest(folder.parent), name).values()
        components[name] = {
            "parameters": sum(counts.values()),
            "dtypes": counts,
            "bytes": sum(file["size"] for file in files),
            "path": str(folder),
            "shared": folder.parent != checkpoint.path,
        }
    return {
        "path": str(checkpoint.path),
        "source": checkpoint.source,
        "dtype": checkpoint.dtype,
        "fingerprint": checkpoint.fingerprint,
        "components": components,
        "config": to_dict(checkpoint.config),
    }


def _of_config(config: ModelConfig) -> dict[str, Any]:
    """The contents that a checkpoint of this architecture would have; allocates nothing."""
    import jax

    from k3jax.config import COMPONENTS
    from k3jax.model.abstract import abstract_module

    components = {}
    for name in COMPONENTS:
        leaves = jax.tree.leaves(abstract_module(name, config, "bfloat16"))
        count = sum(math.prod(leaf.shape) for leaf in leaves)
        components[name] = {"parameters": count, "dtypes": {"bfloat16": count}, "bytes": 2 * count}
    return {"path": None, "components": components, "config": to_dict(config)}


def _lines(described: dict[str, Any]) -> list[str]:
    """The same for people."""
    config, components = described["config"], described["components"]
    sampler = config["sampler"]
    facts = {
        "source": _source(described.get("source")),
        "conditioning": config["conditioning"],
        "input": f"{config['unet']['in_channels']} channels"
        f"{' (inpainting)' if config['unet']['in_channels'] == 9 else ''}",
        "image size": f"{config['sample_size']} x {config['sample_size']}",
        "sampler": f"{sampler['name']}, {sampler['num_inference_steps']} steps, "
        f"guidance {sampler['guidance_scale']:g}, eta {sampler['eta']:g}",
        "dtype": described.get("dtype"),
        "fingerprint": described.get("fingerprint"),
    }
    lines = [described["path"] or "a model of this config, in bfloat16"]
    lines += [f"  {name:<14}{value}" for name, value in facts.items() if value]
    lines += ["", f"  {'component':<16}{'parameters':>15}  {'size':>9}  dtype"]
    for name, part in components.items():
        where = f"  shared: {part['path']}" if part.get("shared") else ""
        lines.append(_row(name, part["parameters"], part["bytes"], _dtypes(part), where))
    total = [sum(part[key] for part in components.values()) for key in ("parameters", "bytes")]
    own = sum(part["bytes"] for part in components.values() if not part.get("shared"))
    without = f"  {_size(own)} of them here" if own != total[1] else ""
    lines.append(_row("total", *total, "", without).rstrip())
    if described.get("faults") == []:
        lines += ["", "  All files are as they were written."]
    return lines


def _row(name: str, parameters: int, size: int, dtypes: str, where: str) -> str:
    return f"  {name:<16}{parameters:>15,}  {_size(size):>9}  {dtypes}{where}"


def _source(source: dict[str, Any] | None) -> str:
    """'original, variant flash, of ai-forever/Kandinsky3.1'"""
    if not source:
        return ""
    words = [str(source.get("layout", "unknown"))]
    if source.get("variant"):
        words.append(f"variant {source['variant']}")
    words += [str(source[key]) for key in ("repo", "path", "note") if key in source]
    return ", ".join(words)


def _dtypes(part: dict[str, Any]) -> str:
    counts = part["dtypes"]
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{dtype} ({count:,})" for dtype, count in counts.items())


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
