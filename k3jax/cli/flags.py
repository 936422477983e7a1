# SPDX-License-Identifier: Apache-2.0
"""Flags of the command line, from the options of the pipelines and the keys of configs.

The destination of a flag is its dotted key in `RunConfig`, such as generate.seed.
"""

import argparse
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, get_args, get_origin

from k3jax.cli.run_config import key_type, parts, without_none
from k3jax.pipelines.option_fields import Options, option_fields


AddArgument = Callable[..., Any]
"""The method add_argument of a parser or of a group of one."""


def add_options(
    add: AddArgument,
    options: type[Options],
    only: Collection[str] | None = None,
    without: Collection[str] = (),
    flags: Mapping[str, str] | None = None,
    texts: Mapping[str, str] | None = None,
    prefix: str = "",
) -> None:
    """Adds a flag for every option that has one.

    Args:
        only, without: names of options.
        flags, texts: name -> another flag or help than the option's own.
        prefix: of the keys of options without a group of their own.
    """
    for name, option in option_fields(options).items():
        flag = (flags or {}).get(name, option.flag)
        if not flag or name in without or (only is not None and name not in only):
            continue
        key = f"{option.group}.{name}" if option.group else f"{prefix}{name}"
        help = (texts or {}).get(name, option.help)
        if option.default not in (None, ()) and option.type is not bool:
            help += f" ({option.default})"
        is_list = get_origin(option.annotation) is tuple
        hint = option.annotation if is_list else option.config_type
        add_flag(add, key, flag, help, hint, option.repeated)


def add_setting(add: AddArgument, key: str, flag: str, help: str) -> None:
    """Adds a flag for a key of `RunConfig`, of the type of the key."""
    add_flag(add, key, flag, help, without_none(key_type(key)))


def add_flag(
    add: AddArgument, key: str, flag: str, help: str, hint: Any, repeated: bool = False
) -> None:
    """Adds a flag.

    Args:
        flag: as "-n --num-images N": names, and metavars of its values.
        hint: type of the key. A tuple takes as many values as there are metavars; with one metavar
            it is a list with commas.
        repeated: whether the flag adds a value to a list each time it is given.
    """
    names = [word for word in flag.split() if word.startswith("-")]
    metavar = tuple(word for word in flag.split() if not word.startswith("-"))
    kwargs: dict[str, Any] = {}
    if hint is bool:
        kwargs["action"] = "store_true"
    elif get_origin(hint) is Literal:
        kwargs["choices"] = get_args(hint)
    elif repeated:
        kwargs |= {"action": "append", "metavar": metavar[0]}
    elif get_origin(hint) is tuple and len(metavar) > 1:
        kwargs |= {"nargs": len(metavar), "type": get_args(hint)[0], "metavar": metavar}
    else:
        kind = parts if get_origin(hint) is tuple else hint
        kwargs |= {"type": kind, "metavar": metavar[0] if metavar else None}
    add(*names, dest=key, default=None, help=help, **kwargs)


def flag_values(args: argparse.Namespace) -> dict[str, Any]:
    """Key of `RunConfig` -> value of its flag; None where the flag is not given."""
    values = {key: value for key, value in vars(args).items() if "." in key}
    return values | {"checkpoint": getattr(args, "checkpoint", None)}
