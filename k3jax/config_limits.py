# SPDX-License-Identifier: Apache-2.0
"""Sizes that a model can have: damaged or mistyped values of config.json are refused here.

The limits are far above every real model. They keep a wrong number from ending in a traceback of
some layer, in memory that no machine has, or in a module that takes hours to build.
"""

import dataclasses
import math
from typing import Any


MOST = 2**20
_LEAST = {
    "num_layers": 0,  # of a text encoder that is streamed, without its layers
    "num_vq_embeddings": 0,
    "steps_offset": 0,
    "init_channels": 4,
    "relative_attention_num_buckets": 4,
}
_MOST = {
    "layers_per_block": 32,
    "num_layers": 512,
    "vocab_size": 2**24,
    "num_vq_embeddings": 2**24,
    "sample_size": 2**16,
    "num_train_timesteps": 100_000,
    "num_inference_steps": 100_000,
}
"""Of a field by name, where it is not 1 and MOST."""
MOST_LEVELS = 8
_POSITIVE = ("layer_norm_epsilon", "beta_start", "beta_end", "clip_sample_range")


def check_sizes(config: Any, where: str = "") -> None:
    """Checks every number of a config and of those in it.

    Args:
        config: a dataclass of k3jax/config.py.
        where: of the config in its model, such as "unet.".

    Raises:
        ValueError: one sentence that names the setting.
    """
    for name, value in vars(config).items():
        if dataclasses.is_dataclass(value):
            check_sizes(value, f"{where}{name}.")
        elif isinstance(value, tuple):
            _check_list(value, name, where)
        elif isinstance(value, int) and not isinstance(value, bool):
            _check_integer(value, name, where)
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise ValueError(f"{where}{name} is {value}; it must be a finite number.")
            if name in _POSITIVE and value <= 0:
                raise ValueError(f"{where}{name} is {value}; it must be above 0.")


def check_unet(config: Any) -> None:
    """Channels of a UNetConfig that has passed `check_sizes`, as its blocks divide them.

    Raises:
        ValueError: one sentence that names the setting.
    """
    if config.init_channels % 2:
        raise ValueError(f"unet.init_channels is {config.init_channels}; it must be even.")
    levels = config.block_out_channels
    widths = (config.init_channels, *levels)
    # The first block of an up level has the skip connection beside its input.
    wide = {*map(max, zip(widths, levels, strict=False)), *levels, *(2 * w for w in levels[:-1])}
    for channels in sorted({*widths, *(w // config.compression_ratio for w in wide)}):
        if channels == 0 or channels % config.groups:
            raise ValueError(
                f"unet has a block of {channels} channels, which do not split into unet.groups = "
                f"{config.groups} groups."
            )
    attended = {config.time_embedding_dim}
    for i in range(len(levels)):
        j = len(levels) - 1 - i  # the up path reads the flags from their end
        self_flags = {i: config.add_self_attention[i], j: config.add_self_attention[-1 - i]}
        cross_flags = {i: config.add_cross_attention[i], j: config.add_cross_attention[-1 - i]}
        attended |= {widths[level] for level, flag in self_flags.items() if flag}
        attended |= {levels[level] for level, flag in cross_flags.items() if flag}
    for channels in sorted(attended):
        if channels % config.attention_head_dim:
            raise ValueError(
                f"unet has attention over {channels} channels, which do not split into heads of "
                f"unet.attention_head_dim = {config.attention_head_dim}."
            )


def check_movq(config: Any) -> None:
    """Channels of a MoVQConfig that has passed `check_sizes`; the decoder's groups are fixed."""
    for channels in config.block_out_channels:
        for groups, name in ((config.norm_num_groups, "movq.norm_num_groups"), (32, "its decoder")):
            if channels % groups:
                raise ValueError(
                    f"movq has {channels} channels, which do not split into the {groups} groups "
                    f"of {name}."
                )


def check_text_encoder(config: Any) -> None:
    """Relative positions of a TextEncoderConfig that has passed `check_sizes`."""
    buckets, distance = (
        config.relative_attention_num_buckets,
        config.relative_attention_max_distance,
    )
    if buckets % 4 or distance <= buckets // 4:
        raise ValueError(
            f"text_encoder has {buckets} relative_attention_num_buckets and "
            f"{distance} as relative_attention_max_distance; it needs a multiple of 4 buckets, "
            "and a distance of more than a quarter of them."
        )


def _check_list(values: tuple, name: str, where: str) -> None:
    if name == "block_out_channels" and not 1 <= len(values) <= MOST_LEVELS:
        raise ValueError(
            f"{where}{name} has {len(values)} levels; it must have 1 to {MOST_LEVELS}."
        )
    if len(values) > 2 * MOST_LEVELS:
        raise ValueError(f"{where}{name} has {len(values)} values; it must have one per level.")
    for value in values:
        if isinstance(value, int) and not isinstance(value, bool):
            _check_integer(value, name, where)


def _check_integer(value: int, name: str, where: str) -> None:
    least, most = _LEAST.get(name, 1), _MOST.get(name, MOST)
    if not least <= value <= most:
        shown = str(value) if abs(value) < 10**30 else "a number of more than 30 digits"
        raise ValueError(f"{where}{name} is {shown}; it must be between {least} and {most}.")
