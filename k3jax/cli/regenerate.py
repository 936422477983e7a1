# SPDX-License-Identifier: Apache-2.0
"""Generate single images of a data set again, from its own manifest and metadata.

  k3jax regenerate pictures 000000017
  k3jax regenerate pictures cat-3 dog-1 --output again --checkpoint weights/kandinsky3

Prints the paths of the files, and whether their bytes equal those in the data set. They do with the
same software on the same kind of chip; elsewhere a few pixels may differ by 1/255.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

from k3jax.cli.environment import require
from k3jax.cli.flags import AddArgument, add_options
from k3jax.pipelines.load_options import LoadOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("data_set", metavar="OUT", help="folder or address of the data set")
    add("ids", metavar="ID", nargs="+", help="ids of the samples")
    add("-o", "--output", metavar="DIR", default=".", help="folder of the images (.)")
    add("--overwrite", action="store_true", help="replace files that exist")
    add_sources(add)


def add_sources(add: AddArgument) -> None:
    """The present places of a data set's sources, and the devices to use."""
    add("--checkpoint", metavar="DIR", help="where the weights are now")
    add("--lora", metavar="DIR", help="where the LoRA is now")
    add("--prompts", metavar="FILE", nargs="+", default=[], help="where the prompts are now")
    add("--mesh", help="devices of this host (as recorded in the data set)")
    add("--batch-size", type=int, metavar="N", help="images at a time (as recorded)")
    add_options(add, LoadOptions, only=("stream_text_encoder",))


def devices_by(args: argparse.Namespace) -> Callable:
    """Function: the recorded devices of a shard -> those of this host, used in the same way."""
    from k3jax.synthesis.regeneration import devices_as_recorded

    return functools.partial(
        devices_as_recorded,
        mesh=args.mesh,
        batch_size=args.batch_size,
        stream_text_encoder=bool(getattr(args, "pipeline.stream_text_encoder")),
    )


def run(args: argparse.Namespace) -> int:
    require("synth")
    from k3jax.synthesis.regeneration import StoredSamples, regenerate, weights_of
    from k3jax.synthesis.run_manifest import read_manifest
    from k3jax.synthesis.samples import key_of
    from k3jax.synthesis.store import LocalStore, store_at

    store = store_at(args.data_set)
    manifest = read_manifest(store)
    weights = weights_of(manifest, args.checkpoint, args.lora)
    stored = StoredSamples(store, manifest, weights.checkpoint, args.prompts)
    places = stored.find(args.ids)
    found = {sample_id: places[sample_id] for sample_id in args.ids}
    target = LocalStore(args.output)
    extension = manifest.settings.encoding.extension
    names = {sample_id: f"{key_of(sample_id)}.{extension}" for sample_id in found}
    existing = [name for name in names.values() if target.exists(name)]
    if existing and not args.overwrite:
        raise ValueError(
            f"{target.root / existing[0]} exists already: choose another --output, or --overwrite."
        )
    target.prepare()
    code = 0
    devices_for = devices_by(args)
    for made_on, group in _by_device(found):
        samples = [found[sample_id].sample for sample_id in group]
        made = regenerate(manifest, weights, samples, devices_for(made_on))
        for sample_id in group:
            encoded, row = made[sample_id], found[sample_id].row
            if encoded.fault is not None:
                print(f"k3jax: {sample_id} failed: {encoded.fault}", file=sys.stderr)
                code = 1
                continue
            target.write(names[sample_id], encoded.content)
            print(Path(args.output) / names[sample_id])
            print(f"k3jax: {sample_id}: {_judged(encoded, row)}.", file=sys.stderr)
    return code


def _by_device(found):
    """The ids of samples by the kind of device and batch that generated them."""
    groups = {}
    for sample_id, sample in found.items():
        key = str(sorted(sample.made_on.items()))
        groups.setdefault(key, (sample.made_on, []))[1].append(sample_id)
    return groups.values()


def _judged(encoded, row) -> str:
    if row is None or row["sha256"] is None:
        return "generated for the first time"
    if encoded.sha256 == row["sha256"]:
        return "the same bytes as in the data set"
    return "not the same bytes as in the data set, which was made by other software or devices"
