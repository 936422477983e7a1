# SPDX-License-Identifier: Apache-2.0
"""Show a data set as one HTML page: thumbnails, prompts, seeds, a search box.

  k3jax gallery pictures

Writes gallery.html into OUT, or into the folder of --output. It opens from disk and loads nothing
from the network. The thumbnails of more than 2,000 images are next to it, in the folder gallery.
"""

import argparse

from k3jax.cli.environment import require


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("output", metavar="OUT", help="folder or address of the data set")
    add("-o", "--output", dest="folder", metavar="DIR", help="folder of the page (OUT)")
    add(
        "--max-images",
        type=int,
        default=100_000,
        metavar="N",
        help="of a larger set, show every n-th image (100000)",
    )


def run(args: argparse.Namespace) -> None:
    require("synth")
    if args.max_images < 1:
        raise ValueError(f"--max-images is {args.max_images}; it must be 1 or more.")

    from k3jax.synthesis.gallery import write_gallery
    from k3jax.synthesis.run_manifest import read_manifest
    from k3jax.synthesis.store import store_at

    store = store_at(args.output)
    target = None if args.folder is None else store_at(args.folder)
    names = write_gallery(store, read_manifest(store), args.max_images, args.progress, target)
    print(f"{target or store}/{names[0]}")
