# SPDX-License-Identifier: Apache-2.0
"""The READMEs of the repository: their blocks of code, and the commands in these."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[1]
CARDS = ROOT / "k3jax" / "weights"  # model cards, which tests/checkpoints/test_cards.py checks
FOLDERS = (".github", "k3jax", "configs", "convert", "launch", "tests")


def readmes() -> list[Path]:
    """Every document: README.md files, and .github/CONTRIBUTING.md."""
    found = [ROOT / "README.md"]
    for folder in FOLDERS:
        found += sorted((ROOT / folder).rglob("*.md"))
    return [path for path in found if CARDS not in path.parents and ".jax_cache" not in path.parts]


READMES = readmes()


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """One fenced block of a README."""

    path: Path
    line: int
    """Of its first line of code, from 1."""
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{name_of(self.path)}:{self.line}"

    def commands(self) -> list[list[str]]:
        """The words of each command of a shell block; pipes and && separate commands."""
        text = re.sub(r"(^|\s)#.*", r"\1", self.text.replace("\\\n", " "))
        lexer = shlex.shlex(text, posix=True, punctuation_chars="|&;\n")
        lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
        commands = [[]]
        for token in lexer:
            if set(token) <= set("|&;\n"):
                commands.append([])
            else:
                commands[-1].append(token)
        return [_without_variables(words) for words in commands if words]


def _without_variables(words: list[str]) -> list[str]:
    return words[1:] if re.fullmatch(r"[A-Z_0-9]+=.*", words[0]) else words


def blocks(path: Path) -> Iterator[Block]:
    """The fenced blocks of a README, in their order."""
    text = path.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M):
        line = text[: match.start(2)].count("\n") + 1
        yield Block(path, line, match[1], match[2])
