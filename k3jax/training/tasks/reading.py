# SPDX-License-Identifier: Apache-2.0
"""A text encoder and tokenizer from scratch, for the captions of `k3jax.scenes`.

The large models borrow an encoder that has read the web. A small one learns to read here, before
the U-Net is trained: from the embedding of each noun a linear layer must tell everything the
caption says of that object (its colour, texture, size, place, count, and how it stands to the other
one), so that cross-attention finds what belongs together in one place.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from k3jax.model.text_encoder import TextEncoder
from k3jax.scenes.caption import PLURALS, caption
from k3jax.scenes.scene import (
    BACKGROUNDS,
    COLORS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    TEXTURES,
    Scene,
    scene_at,
)


SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
MAX_NOUNS = 2
SIZE_NAMES = ("small", None, "large")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

# What is asked of each noun: name -> the answers.
QUESTIONS = {
    "shape": tuple(SHAPES),
    "color": tuple(COLORS),
    "texture": tuple(TEXTURES),
    "size": SIZE_NAMES,
    "background": tuple(BACKGROUNDS),
    "position": (None, *POSITIONS),
    "relation": (None, "and", *RELATIONS),
    "count": (1, 2, 3, 4),
}


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
    """What the tokenizer is trained on."""
    for index in range(count):
        yield caption(scene_at(seed, index), np.random.default_rng([seed, index, 8]))


def disturbed(text: str, rng: np.random.Generator) -> str:
    """A caption as people might write it: sometimes with an opening, sometimes with a strange word.

    Tokens that no caption holds would otherwise keep random embeddings.
    """
    if rng.random() < 0.2:
        opening = ("a picture of", "a photo of", "a drawing of", "an image of", "draw", "show")
        text = f"{opening[rng.integers(len(opening))]} {text}"
    words = text.split()
    while rng.random() < 0.15:
        letters = rng.integers(ord("a"), ord("z") + 1, rng.integers(2, 8), dtype=np.uint8)
        words.insert(int(rng.integers(len(words) + 1)), letters.tobytes().decode())
    if rng.random() < 0.1:
        words[-1] += ".!,"[rng.integers(3)]
    return " ".join(words)


def reading_labels(scenes: Sequence[Scene]) -> dict[str, np.ndarray]:
    """Question -> int32 (b, MAX_NOUNS), the answer for each noun in order; -1: no such noun."""
    labels = {name: np.full((len(scenes), MAX_NOUNS), -1, np.int32) for name in QUESTIONS}
    for row, scene in enumerate(scenes):
        objects = scene.objects[:1] if scene.kind == "count" else scene.objects
        for noun, item in enumerate(objects):
            relation = scene.relation or ("and" if scene.kind == "pair" else None)
            answers = {
                "shape": item.shape,
                "color": item.color,
                "texture": item.texture,
                "size": item.size_name,
                "background": scene.background,
                "position": scene.position,
                "relation": OPPOSITE.get(relation, relation) if noun else relation,
                "count": scene.count if scene.kind == "count" else 1,
            }
            for name, answer in answers.items():
                labels[name][row, noun] = QUESTIONS[name].index(answer)
    return labels


def noun_ids(tokenize) -> np.ndarray:
    """The token ids of the shapes' names, singular and plural.

    Args:
        tokenize: a `k3jax.model.tokenizer.Tokenizer`.

    Raises:
        ValueError: a name that is more than one token.
    """
    names = [*SHAPES, *PLURALS.values()]
    ids, mask = tokenize(names)
    split = [name for name, n in zip(names, mask.sum(1), strict=True) if n != 2]
    if split:
        raise ValueError(f"the tokenizer splits {split}: train it with a larger vocabulary.")
    return ids[:, 0]


class ReadingHeads(nnx.Module):
    """One linear layer per question; only for the training of the encoder."""

    def __init__(self, d_model: int, seed: int):
        rng = np.random.default_rng([seed, 17])
        self.kernels = nnx.Dict(
            {
                name: nnx.Param(
                    jnp.asarray(rng.standard_normal((d_model, len(answers)), np.float32))
                    * d_model**-0.5
                )
                for name, answers in QUESTIONS.items()
            }
        )


def reading_loss(
    encoder: TextEncoder,
    heads: ReadingHeads,
    input_ids: jax.Array,
    attention_mask: jax.Array,
    nouns: jax.Array,
    labels: dict[str, jax.Array],
) -> tuple[jax.Array, dict]:
    """Cross-entropy of all answers.

    Args:
        input_ids, attention_mask: (b, n).
        nouns: int32 (b, MAX_NOUNS), the place of each noun in its caption (0 where there is none).
        labels: from `reading_labels`.

    Returns:
        Scalar loss; metrics: the share of right answers by question, and `all_right`.
    """
    embeds = encoder(input_ids, attention_mask).astype(jnp.float32)
    at_nouns = jnp.take_along_axis(embeds, nouns[..., None], axis=1)
    loss, metrics, all_right = 0.0, {}, True
    for name, label in labels.items():
        asked = label >= 0
        logits = at_nouns @ heads.kernels[name][...]
        log_p = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(log_p, jnp.maximum(label, 0)[..., None], axis=-1)[..., 0]
        loss = loss - jnp.where(asked, picked, 0).sum() / asked.sum()
        right = jnp.where(asked, logits.argmax(-1) == label, True)
        all_right = all_right & right.all(1)
        metrics[name] = (right & asked).sum() / asked.sum()
    return loss, {**metrics, "all_right": jnp.mean(all_right)}


def find_nouns(input_ids: np.ndarray, ids_of_nouns: np.ndarray) -> np.ndarray:
    """int32 (b, MAX_NOUNS): the first places where a shape is named; 0 where there is none."""
    places = np.zeros((len(input_ids), MAX_NOUNS), np.int32)
    for row, found in enumerate(np.isin(input_ids, ids_of_nouns)):
        where = np.flatnonzero(found)[:MAX_NOUNS]
        places[row, : len(where)] = where
    return places
