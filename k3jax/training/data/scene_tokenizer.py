# SPDX-License-Identifier: Apache-2.0
"""A tokenizer trained on the captions of `k3jax.scenes`."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np

from k3jax.scenes.caption import caption
from k3jax.scenes.scene import scene_at
from k3jax.training.signals import agree


SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")


def train_tokenizer(folder: Path, seed: int, new: bool = False) -> Path:
    """The tokenizer of a text encoder from scratch, trained once in the run's folder.

    Args:
        new: train it again although there is one, of an earlier run without a checkpoint.
    """
    path = Path(folder) / "tokenizer"
    if jax.process_index() == 0 and (new or not (path / "tokenizer_config.json").exists()):
        part = Path(folder) / ".tokenizer.part"
        for old in (part, path):
            shutil.rmtree(old, ignore_errors=True)
        write_tokenizer(part, captions_to_learn(seed))
        part.rename(path)
    agree(False)  # no process reads it before it is complete
    return path


def write_tokenizer(folder: str | Path, captions: Iterable[str], vocab_size: int = 512) -> None:
    """Trains a byte-level BPE tokenizer (lower-casing) and writes its folder.

    Every word of the captions becomes one token; other words fall into pieces or bytes.
    """
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    end = tokenizer.token_to_id("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", end)]
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(Path(folder) / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 128,
    }
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def captions_to_learn(seed: int, count: int = 20_000) -> Iterable[str]:
    """The captions that the tokenizer is trained on."""
    for index in range(count):
        yield caption(scene_at(seed, index), np.random.default_rng([seed, index, 8]))
