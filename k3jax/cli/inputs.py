# SPDX-License-Identifier: Apache-2.0
"""The inputs of a command: its prompts, its checkpoint, its LoRA. No weights are read here."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from k3jax.arguments import check_text
from k3jax.checkpoints.format import DEFAULT
from k3jax.cli.flags import flag_values
from k3jax.cli.run_config import RunConfig, architecture_differences, build, collect
from k3jax.config import ModelConfig


if TYPE_CHECKING:
    from k3jax.checkpoints.format import Checkpoint

NOTE = (
    "k3jax: note: no --checkpoint was given, so this is the small model of coloured shapes that "
    "comes with k3jax. For Kandinsky 3 itself: `k3jax convert kandinsky-community/kandinsky-3 DIR` "
    "(28 GB), then --checkpoint DIR."
)


def read_prompts(prompts: Sequence[str], file: str | None) -> list[str]:
    """The prompts of the command line, then those of a file without its empty lines.

    Args:
        file: path of a UTF-8 text with one prompt per line, or - for standard input.

    Raises:
        ValueError: no prompt at all, or a line that cannot be read, with its number.
    """
    found = list(prompts)
    if file is not None:
        path = Path(file)
        if file != "-" and not path.expanduser().is_file():
            raise ValueError(f"the file of prompts {file} does not exist.")
        content = sys.stdin.buffer.read() if file == "-" else path.expanduser().read_bytes()
        found += _lines("standard input" if file == "-" else file, content)
    if not found:
        empty = "" if file is None else f": {file} holds none"
        raise ValueError(f"give at least one prompt, or --prompts-file FILE{empty}.")
    return found


def _lines(name: str, content: bytes) -> list[str]:
    prompts = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            prompt = line.decode().strip()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name}, line {number}: byte {error.start + 1} is not UTF-8; save it as UTF-8."
            ) from None
        if prompt:
            prompts.append(check_text(prompt, f"{name}, line {number}"))
    return prompts


def open_checkpoint(
    args: argparse.Namespace, default: str | Path = DEFAULT
) -> tuple["Checkpoint", RunConfig]:
    """The checkpoint of a command, and the settings of its run.

    The sampler and the size in the checkpoint's config are those of the run. Without a checkpoint
    the dtype is float32 by default: small weights need no half precision, and XLA:CPU compiles
    their loop in 10 seconds instead of 16.

    Args:
        default: the checkpoint where neither a flag nor the config names one.

    Raises:
        ValueError: no such checkpoint, or a config of another architecture.
    """
    from k3jax.checkpoints.format import as_path, read_checkpoint

    values = collect(args.config, args.overrides, flag_values(args))
    path = values.get("checkpoint")
    if path is None:
        values.setdefault("pipeline", {}).setdefault("dtype", "float32")
    elif args.checkpoint is None and not as_path(path).exists():
        raise ValueError(
            f"the config's checkpoint {path} does not exist: write it with `k3jax convert`, or "
            "give --checkpoint DIR."
        )
    checkpoint = read_checkpoint(default if path is None else path)
    config = build(values, checkpoint.config)
    check_architecture(checkpoint, config.model)
    return dataclasses.replace(checkpoint, config=config.model), config


def check_architecture(checkpoint: "Checkpoint", model: ModelConfig) -> None:
    differences = architecture_differences(checkpoint.config, model)
    if differences:
        raise ValueError(
            f"{checkpoint.path} is of another architecture than the config: {differences}; give "
            "the config of this checkpoint, or none."
        )


def check_lora(config: RunConfig) -> None:
    """Refuses a LoRA that does not fit the model."""
    folder, scale = config.pipeline.lora, config.pipeline.lora_scale
    if folder is None:
        if scale != 1:
            raise ValueError("--lora-scale is the strength of a LoRA: give its folder with --lora.")
        return

    from k3jax.checkpoints.lora_files import load_lora
    from k3jax.model import adapters
    from k3jax.model.abstract import abstract_module

    loaded = load_lora(folder)
    adapters.update_factor(loaded.config, scale)
    unet = abstract_module("unet", config.model)
    adapters.check_fits(loaded.weights, unet, loaded.config, where=f"The LoRA {loaded.path}")
