# SPDX-License-Identifier: Apache-2.0
"""Prompts of the command line: arguments, or the lines of a file."""

import sys
from collections.abc import Sequence
from pathlib import Path


def read_prompts(prompts: Sequence[str], file: str | None) -> list[str]:
    """The prompts of the command line and then those of a file, empty lines left out.

    Args:
        file: path of a UTF-8 text with one prompt per line, or - for standard input.

    Raises:
        ValueError: no prompt at all, or a line that cannot be read, with its number.
    """
    read = list(prompts)
    if file is not None:
        content = sys.stdin.buffer.read() if file == "-" else _content(file)
        read += _lines("standard input" if file == "-" else file, content)
    if not read:
        empty = "" if file is None else f": {file} holds none"
        raise ValueError(f"give at least one prompt, or --prompts-file FILE{empty}.")
    return read


def check_prompts(prompts: Sequence[str], negative_prompt: str | None) -> None:
    """Raises ValueError for prompts that the tokenizer would refuse."""
    from k3jax.model.tokenizer import check_prompt

    for number, prompt in enumerate(prompts):
        check_prompt(prompt, number)
    if negative_prompt is not None:
        _named("the negative prompt", negative_prompt)


def _content(file: str) -> bytes:
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"the file of prompts {file} does not exist.")
    return path.read_bytes()


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
            _named(f"{name}, line {number}", prompt)
            prompts.append(prompt)
    return prompts


def _named(name: str, prompt: str) -> None:
    """`check_prompt` for a prompt that has a name instead of a number."""
    from k3jax.model.tokenizer import check_prompt

    try:
        check_prompt(prompt, 0)
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).removeprefix('prompt 0 ')}") from None
