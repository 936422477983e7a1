# SPDX-License-Identifier: Apache-2.0
"""Turn a PyTorch checkpoint into one of k3jax.

SRC is a folder, or owner/name on the Hugging Face hub, with the files of diffusers or those of the
original Kandinsky 3.0 or 3.1. DST is a folder (or gs://...) that does not exist. An interrupted
conversion leaves nothing at DST and can be run again.

  k3jax convert kandinsky-community/kandinsky-3 weights/kandinsky3-diffusers
  k3jax convert ai-forever/Kandinsky3.1 weights/kandinsky3
  k3jax convert ai-forever/Kandinsky3.1 weights/flash --variant flash \\
      --text-encoder-from weights/kandinsky3

With --config, the architecture is that of the config and not what the source says of itself.
"""

import argparse

from k3jax.cli.run_config import RunConfig, build, collect
from k3jax.config import to_dict


ARCHITECTURE = ("text_encoder", "text_projection", "unet", "movq", "sampler")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="folder or Hugging Face id")
    parser.add_argument("destination", metavar="DST", help="folder to be made")
    parser.add_argument(
        "--variant", choices=("base", "flash", "inpainting"), help="which model of SRC (base)"
    )
    parser.add_argument(
        "--weights-variant", metavar="NAME", help="fp16: take the files named *.fp16.*"
    )
    parser.add_argument(
        "--text-encoder-from",
        metavar="CKPT",
        help="use the text encoder of this k3jax checkpoint (17 GB) instead of a copy",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of the weights; by default each keeps its own",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at DST")


def run(args: argparse.Namespace) -> None:
    settings = {
        "convert.variant": args.variant,
        "convert.weights_variant": args.weights_variant,
        "convert.text_encoder_from": args.text_encoder_from,
        "convert.param_dtype": args.dtype,
    }
    values = collect(args.config, args.overrides, settings)
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


def _architecture(config: RunConfig, said: dict) -> dict[str, dict] | None:
    """The settings of the model that were said, by component."""
    said = {part: values for part, values in said.items() if part in ARCHITECTURE}
    if config.convert.text_encoder_from is not None:
        said.pop("text_encoder", None)
    if not said:
        return None
    checked = to_dict(config.model)
    return {part: {key: checked[part][key] for key in values} for part, values in said.items()}
