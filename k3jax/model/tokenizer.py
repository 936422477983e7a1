# SPDX-License-Identifier: Apache-2.0
"""Prompts -> token ids, through transformers' T5 tokenizer."""

import tempfile
import warnings
from collections.abc import Sequence

import numpy as np
from etils import epath

from k3jax.arguments import check_text
from k3jax.config import MAX_TOKENS
from k3jax.files import LFS_ADVICE, LFS_POINTER, is_local, read_object


TOKENIZERS = ("tokenizer.json", "spiece.model")
"""One of them holds the vocabulary; the first one that exists is read."""
TOKENIZER_FILES = (
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


class PromptTruncatedWarning(UserWarning):
    """A prompt has more tokens than the model sees."""


class Tokenizer:
    """Tokenises prompts to exactly MAX_TOKENS ids, the end-of-sequence token included.

    No cleaning and no lower-casing, as in the references.
    """

    def __init__(self, folder: epath.PathLike):
        """
        Args:
            folder: holds tokenizer.json, or only spiece.model as the published folders do; local or
                in a bucket.

        Raises:
            ValueError: it holds no tokenizer, or one that cannot be read; names the file.
        """
        folder = epath.Path(folder)
        if not any((folder / name).exists() for name in TOKENIZERS):
            raise ValueError(
                f"{folder} is not a tokenizer: it holds neither tokenizer.json nor spiece.model."
            )
        with tempfile.TemporaryDirectory() as copy:
            local = folder
            if not is_local(folder):  # transformers reads local files
                local = epath.Path(copy)
                for file in folder.iterdir():
                    file.copy(local / file.name)
            self._tokenizer = _loaded(local, folder)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        return len(self._tokenizer)

    def __call__(
        self, prompts: Sequence[str], names: Sequence[str] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask of each prompt.

        A prompt with more than MAX_TOKENS tokens loses its end (not the end-of-sequence token), and
        a PromptTruncatedWarning names what was cut.

        Args:
            names: of the prompts in messages; "prompt 0", ... by default.

        Returns:
            int32 (b, MAX_TOKENS) ids, padded with 0; bool (b, MAX_TOKENS), true at tokens.
        """
        names = _names(prompts) if names is None else names
        whole = [tokens for tokens, _ in self.whole(prompts, names)]
        ids = np.zeros((len(prompts), MAX_TOKENS), np.int32)
        mask = np.zeros((len(prompts), MAX_TOKENS), bool)
        for number, tokens in enumerate(whole):
            if len(tokens) > MAX_TOKENS:
                warn_of_cut(names[number], len(tokens), self.decode(tokens[MAX_TOKENS - 1 : -1]))
                tokens = [*tokens[: MAX_TOKENS - 1], tokens[-1]]
            ids[number, : len(tokens)] = tokens
            mask[number, : len(tokens)] = True
        return ids, mask

    def whole(
        self, prompts: Sequence[str], names: Sequence[str] | None = None
    ) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """All tokens of each prompt, the end-of-sequence last, and the characters that they cover.

        Returns:
            (ids, (first character, end) of each) of each prompt; an end-of-sequence has none.
        """
        for name, prompt in zip(_names(prompts) if names is None else names, prompts, strict=True):
            check_text(prompt, name)
        tokens = _tokens(self._tokenizer, list(prompts))
        return list(zip(tokens["input_ids"], tokens["offset_mapping"], strict=True))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        return self._tokenizer.decode(tokens)


def tokenizer_fault(folder: epath.PathLike, vocab_size: int | None = None) -> str | None:
    """What keeps a folder from being a tokenizer of a text encoder, or None.

    Args:
        vocab_size: of the text encoder, if any.

    Returns:
        A clause that begins with the file or folder.
    """
    try:
        tokenizer = Tokenizer(folder)
        ((ids, _),) = tokenizer.whole(["A red circle."])
    except ValueError as error:
        return str(error).rstrip(".")
    if len(ids) < 2:
        return f"{folder} yields no tokens"
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        return (
            f"{folder} has {tokenizer.vocab_size} tokens, and the text encoder only {vocab_size}: "
            "it is the tokenizer of another model"
        )
    return None


def _loaded(folder: epath.Path, shown: epath.Path):
    """The tokenizer of transformers in a local folder; errors name `shown` as its folder."""
    from transformers import AutoTokenizer, T5Tokenizer

    for file in folder.iterdir():
        if file.name in TOKENIZER_FILES:
            fault = _file_fault(file)
            if fault is not None:
                raise ValueError(f"{fault.replace(str(folder), str(shown))}; fetch it again.")
    # Without tokenizer.json, AutoTokenizer does not know that it is T5's.
    name = next(name for name in TOKENIZERS if (folder / name).exists())
    kind = AutoTokenizer if name == "tokenizer.json" else T5Tokenizer
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = kind.from_pretrained(str(folder))
            _tokens(tokenizer, ["A red circle."])  # some faults only show here
            return tokenizer
    except BaseException as error:  # the tokenizers library panics: no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        if name == "spiece.model":  # the error is that of a reader of other files, tried last
            what = "is damaged, or not a T5 vocabulary"
        else:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            what = f"is damaged, or no tokenizer that transformers reads ({reason.rstrip('.')})"
            what = what.replace(str(folder), str(shown))
        raise ValueError(f"{shown / name} {what}; fetch it again.") from None


def _tokens(tokenizer, prompts: list[str]):
    return tokenizer(prompts, truncation=False, verbose=False, return_offsets_mapping=True)


def _file_fault(file: epath.Path) -> str | None:
    if file.suffix == ".json":
        try:
            read_object(file)
        except ValueError as error:
            return str(error)
        return None
    start = file.read_bytes()[: len(LFS_POINTER)]
    if start == LFS_POINTER:
        return f"{file} {LFS_ADVICE}"
    return None if start else f"{file} is damaged: it is empty"


def warn_of_cut(name: str, count: int, text: str) -> None:
    """Warns that `text`, the end of the prompt `name` of `count` tokens, is cut off."""
    warnings.warn(
        f"{name} has {count} tokens and the model sees {MAX_TOKENS}; cut off: {_shorten(text)!r}",
        PromptTruncatedWarning,
        stacklevel=4,
    )


def check_prompt(prompt: str, number: int) -> None:
    """Raises ValueError for what is not a printable string; line breaks and tabs are allowed."""
    check_text(prompt, f"prompt {number}")


def _names(prompts: Sequence[str]) -> list[str]:
    return [f"prompt {number}" for number in range(len(prompts))]


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."
