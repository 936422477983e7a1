# SPDX-License-Identifier: Apache-2.0
"""The command `k3jax`. Each subcommand is a module with `add_arguments(parser)` and `run(args)`.

Nothing heavy is imported before a subcommand runs, so that --help and typing errors answer at once.
"""

import argparse
import contextlib
import difflib
import os
import sys
import textwrap
import traceback
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version

from k3jax.cli import (
    benchmark,
    convert,
    evaluate,
    export,
    gallery,
    generate,
    img2img,
    info,
    inpaint,
    outpaint,
    plan,
    regenerate,
    synthesize,
    train,
    verify,
)
from k3jax.cli.config_files import config_names
from k3jax.cli.environment import OPTIONAL, missing


COMMANDS = {
    "generate": generate,
    "img2img": img2img,
    "inpaint": inpaint,
    "outpaint": outpaint,
    "synthesize": synthesize,
    "regenerate": regenerate,
    "verify": verify,
    "gallery": gallery,
    "info": info,
    "convert": convert,
    "export": export,
    "train": train,
    "evaluate": evaluate,
    "plan": plan,
    "benchmark": benchmark,
}
USAGE_ERROR, INTERRUPTED = 2, 130

EPILOG = """settings:
  --config NAME|FILE       a .py file with a get_config(), or one of the configs of k3jax:
{configs}
  --config.a.b=VALUE       one setting, for instance --config.generate.eta=0.5
                           Order of precedence: flags, --config.a.b, the config file, the
                           checkpoint.
environment:
  K3JAX_TRACEBACK=1        print the traceback of an error
  K3JAX_COMPILATION_CACHE=0, JAX_COMPILATION_CACHE_DIR=DIR
                           no cache of compiled programs, or another folder than ~/.cache/k3jax/xla
"""


class UsageError(ValueError):
    """The arguments are wrong."""


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, and without abbreviated options."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        raise UsageError(f"{message} (see `{self.prog} --help`).")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    _open_standard_streams()
    # Without torch, transformers would advise to install it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    with _plain_warnings():
        try:
            args = parse(sys.argv[1:] if argv is None else argv)
            code = args.run(args) or 0
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            print("k3jax: interrupted.", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:
            # The reader of the pipe has exited. Python would print another error at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except Exception as error:
            message = _sentence(error)
            if message is None:
                raise
            if os.environ.get("K3JAX_TRACEBACK", "0") not in ("", "0"):
                traceback.print_exc()
            print(f"k3jax: error: {message}", file=sys.stderr)
            return USAGE_ERROR


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; --help and --version end the program.

    Raises:
        UsageError: one sentence.
    """
    rest, overrides = split_overrides(argv)
    parser, commands = _parser()
    args, unknown = parser.parse_known_args(rest)
    if args.command is None:
        raise UsageError(f"give a command: {', '.join(COMMANDS)} (see `k3jax --help`).")
    if hasattr(args, "prompts"):
        # argparse takes only the first group of prompts and leaves those after an option over.
        args.prompts += [word for word in unknown if not word.startswith("-")]
        unknown = [word for word in unknown if word.startswith("-")]
    if unknown:
        options = [o for a in commands[args.command]._actions for o in a.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], options, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UsageError(
            f"{args.command} has no argument {unknown[0]!r}{hint}; "
            f"see `k3jax {args.command} --help`."
        )
    args.overrides = overrides
    args.progress = not args.no_progress and sys.stderr.isatty()
    args.run = COMMANDS[args.command].run
    return args


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The arguments without --config.a.b=value and --config.a.b value, and those as pairs."""
    rest, overrides = [], []
    words = iter(argv)
    for word in words:
        if word == "--":
            rest += [word, *words]
        elif word.startswith("--config."):
            key, equals, text = word.removeprefix("--config.").partition("=")
            if not equals:
                text = next(words, None)
                if text is None or text.startswith("--"):
                    raise UsageError(f"--config.{key} needs a value.")
            overrides.append((key, text))
        else:
            rest.append(word)
    return rest, overrides


def _parser() -> tuple[Parser, dict[str, Parser]]:
    names = textwrap.fill(", ".join(config_names()), 73, break_on_hyphens=False)
    epilog = EPILOG.format(configs=textwrap.indent(names, 27 * " "))
    parser = Parser(prog="k3jax", description="Kandinsky 3 in JAX.", epilog=epilog)
    parser.add_argument("--version", action="version", version=f"k3jax {version('k3jax')}")
    group = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    commands = {}
    for name, module in COMMANDS.items():
        first, _, rest = (module.__doc__ or f"{name}.").partition("\n")  # python -OO has none
        commands[name] = group.add_parser(
            name, help=first.rstrip("."), description=f"{first}\n{rest}".strip(), epilog=epilog
        )
        commands[name].add_argument(
            "--config", metavar="NAME|FILE", help="a config of k3jax or a .py file; see below"
        )
        module.add_arguments(commands[name])
        commands[name].add_argument(
            "--no-progress", action="store_true", help="no progress bars, not even on a terminal"
        )
    return parser, commands


def _sentence(error: Exception) -> str | None:
    """The message for an error that the user can fix; None for a bug of k3jax."""
    text = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and error.name in OPTIONAL:
        return missing(error.name)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    if isinstance(error, RuntimeError) and "home directory" in text:
        return f"~ cannot be used in a path: {text} Give the path in full."
    # ImportError itself is a sentence of `environment.missing`; its subclass is a failed import.
    if isinstance(error, ValueError | OSError) or type(error) is ImportError:
        inside = _raised_in_k3jax(error)
        return text if inside else f"{text} (K3JAX_TRACEBACK=1 shows where this comes from)"
    if "RESOURCE_EXHAUSTED" in text:
        return (
            "the devices have not enough memory: choose a smaller --batch-size or size, a mesh "
            f"that splits the weights, or --dtype bfloat16 ({text[:200]})."
        )
    return None


def _open_standard_streams() -> None:
    """Opens /dev/null as those of stdin, stdout and stderr that are closed, as by `>&-`.

    Otherwise the next file opened would take their number, and C++ libraries would print into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w"))


def _raised_in_k3jax(error: Exception) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__", "").startswith("k3jax")


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Prints a warning as one line without its place in the code, and each text once."""
    shown = set()

    def show(message, category, filename, lineno, file=None, line=None):
        text = " ".join(str(message).split())
        if text not in shown:
            shown.add(text)
            print(f"k3jax: warning: {text}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
