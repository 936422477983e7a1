# SPDX-License-Identifier: Apache-2.0
"""Tokenizer folders of PyTorch checkpoints, made complete."""

import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path

from k3jax.convert.rules import ConversionError
from k3jax.tokenizer import TOKENIZER_FILES, tokenizer_fault


def prepare_tokenizer(files: Iterable[Path], folder: Path, vocab_size: int | None = None) -> None:
    """Copies a tokenizer's files into `folder`, with a tokenizer.json whether or not there is one.

    Published folders hold only `spiece.model`; tokenizer.json is what loads fast and everywhere.

    Args:
        vocab_size: of the text encoder.

    Raises:
        ConversionError: transformers cannot read the files, or they are another model's; names the
            file of the source.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = list(files)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    fault = tokenizer_fault(folder, vocab_size)
    if fault is not None:
        raise ConversionError(f"{fault.replace(str(folder), str(files[0].parent))}.")
    if (folder / "tokenizer.json").exists():
        return
    from transformers import T5Tokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        T5Tokenizer.from_pretrained(folder).save_pretrained(folder)
    for file in folder.iterdir():
        if file.name not in TOKENIZER_FILES:
            file.unlink()
