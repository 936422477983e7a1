# SPDX-License-Identifier: Apache-2.0
"""Convert a PyTorch checkpoint to one of k3jax.

SRC is a folder, or owner/name on the Hugging Face hub, with the files of diffusers or those of the
original Kandinsky 3.0 or 3.1. DST is a folder (or gs://...) that does not exist. An interrupted
conversion leaves nothing at DST and can be run again.

  k3jax convert kandinsky-community/kandinsky-3 weights/kandinsky3-diffusers
  k3jax convert ai-forever/Kandinsky3.1 weights/kandinsky3
  k3jax convert ai-forever/Kandinsky3.1 weights/flash --variant flash \\
      --text-encoder-from weights/kandinsky3

With --config, the architecture is that of the config and not that of the source's own files.
"""

import argparse
from typing import Any

from k3jax.cli.flags import add_options, flag_values
from k3jax.cli.run_config import RunConfig, build, collect
from k3jax.config import to_dict
from k3jax.convert.options import ConvertConfig


ARCHITECTURE = ("text_encoder", "text_projection", "unet", "movq", "sampler")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="folder or Hugging Face id")
    parser.add_argument("destination", metavar="DST", help="folder to be written")
    add_options(parser.add_argument, ConvertConfig, prefix="convert.")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at DST")


def run(args: argparse.Namespace) -> None:
    values = collect(args.config, args.overrides, flag_values(args))
    config = build(values)

    from k3jax.convert.from_torch import convert

    convert(
        args.source,
        args.destination,
        variant=config.convert.variant,
        weights_variant=config.convert.weights_variant,
        text_encoder_from=config.convert.text_encoder_from,
        param_dtype=config.convert.param_dtype,
        architecture=_architecture(config, values.get("model") or {}),
        progress=args.progress,
        overwrite=args.overwrite,
    )
    print(args.destination)


def _architecture(config: RunConfig, model: dict[str, Any]) -> dict[str, dict] | None:
    """The settings of `model` by component, checked."""
    parts = {part: values for part, values in model.items() if part in ARCHITECTURE}
    if config.convert.text_encoder_from is not None:
        parts.pop("text_encoder", None)
    if not parts:
        return None
    checked = to_dict(config.model)
    return {part: {key: checked[part][key] for key in values} for part, values in parts.items()}
