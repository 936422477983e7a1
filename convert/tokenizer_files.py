# SPDX-License-Identifier: Apache-2.0
"""Tokenizer folders of PyTorch checkpoints, made complete."""

import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path

from k3jax.convert.rules import ConversionError
from k3jax.model.tokenizer import TOKENIZER_FILES, tokenizer_fault


def prepare_tokenizer(files: Iterable[Path], folder: Path, vocab_size: int | None = None) -> None:
    """Copies a tokenizer's files into `folder`, with a tokenizer.json whether or not there is one.

    Published folders hold only `spiece.model`; tokenizer.json is what loads fast and everywhere.

    Args:
        vocab_size: of the text encoder.

    Raises:
        ConversionError: transformers cannot read the files, or they are another model's; names the
            file of the source.
    """
    files = list(files)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copyfile(file, folder / file.name)
    except OSError as error:
        raise ConversionError(
            f"the tokenizer in {files[0].parent} cannot be copied to {folder}: "
            f"{error.strerror or error}."
        ) from None
    fault = tokenizer_fault(folder, vocab_size)
    if fault is not None:
        raise ConversionError(f"{fault.replace(str(folder), str(files[0].parent))}.")
    if (folder / "tokenizer.json").exists():
        return
    from transformers import T5Tokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = T5Tokenizer.from_pretrained(folder)
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # of the tokenizers library: no OSError
            raise ConversionError(
                f"the tokenizer in {files[0].parent} cannot be written to {folder}: {error}."
            ) from None
    for file in folder.iterdir():
        if file.name not in TOKENIZER_FILES:
            file.unlink()
