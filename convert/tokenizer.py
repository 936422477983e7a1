# SPDX-License-Identifier: Apache-2.0
"""Tokenizer folders of PyTorch checkpoints, made complete."""

import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path

from k3jax.convert.layouts import TOKENIZER_FILES
from k3jax.convert.rules import ConversionError


def prepare_tokenizer(files: Iterable[Path], folder: Path) -> None:
    """Copies a tokenizer's files into `folder`, with a tokenizer.json whether or not there is one.

    Published folders hold only `spiece.model`; tokenizer.json is what loads fast and everywhere.

    Raises:
        ConversionError: transformers cannot read the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    if (folder / "tokenizer.json").exists():
        return
    from transformers import T5Tokenizer

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = T5Tokenizer.from_pretrained(folder)
    except Exception as error:  # whatever the tokenizers library raises for a broken model file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConversionError(
            f"{folder / 'spiece.model'} is not a T5 vocabulary that transformers reads: {reason}"
        ) from None
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        if file.name not in TOKENIZER_FILES:
            file.unlink()
