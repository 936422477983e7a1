# SPDX-License-Identifier: Apache-2.0
"""The task text_encoder: a text encoder from scratch, for the captions of `k3jax.scenes`.

The large models use an encoder trained on text of the web. A small one is trained here, before the
U-Net: from the embedding of each noun a linear layer must predict everything that the caption says
of that object (colour, texture, size, position, count, relation to the other one), so that
cross-attention finds all of it in one place.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from k3jax.model.text_encoder import TextEncoder
from k3jax.model.tokenizer import Tokenizer
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
from k3jax.training.data.latent_cache import trimmed
from k3jax.training.data.loader import ENDLESS, import_grain
from k3jax.training.data.scene_tokenizer import train_tokenizer
from k3jax.training.data.training_data import Arrays, TrainingData
from k3jax.training.state import with_weights
from k3jax.training.tasks.task import Task
from k3jax.training.train_config import TrainConfig


MAX_NOUNS = 2
SIZE_NAMES = ("small", None, "large")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

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
"""Question about a noun -> the possible answers."""


class CaptionReading(Task):
    """Trains the text encoder, and the heads that predict the answers from its embeddings."""

    name = "text_encoder"

    def __init__(self, config, model, base, mesh):
        super().__init__(config, model, base, mesh)
        self.trained["reading_heads"] = ReadingHeads(model.text_encoder.d_model, seed=0)

    @classmethod
    def components(cls, config: TrainConfig) -> tuple[str, ...]:
        super().components(config)
        return ("text_encoder",)

    def first_module(self, name: str) -> nnx.Module:
        if name == "reading_heads":
            return ReadingHeads(self.model.text_encoder.d_model, self.config.seed)
        return super().first_module(name)

    def tokenizer(self, folder: Path, new: bool) -> Path:
        return train_tokenizer(folder, self.config.seed, new)

    def open_data(self, tokenizer: Path, progress: bool) -> TrainingData:
        args = (Tokenizer(tokenizer), self.config.batch_size, self.config.seed)
        held_out = CaptionBatches(*args, "test")
        validation = [held_out.batch(n) for n in range(self.config.validation_batches)]
        return TrainingData(CaptionBatches(*args), validation)

    def loss(self, weights, frozen, batch, key):
        modules = {name: with_weights(m, name, weights) for name, m in self.trained.items()}
        labels = {name: batch[name] for name in QUESTIONS}
        inputs = (batch[name] for name in ("input_ids", "attention_mask", "nouns"))
        return reading_loss(modules["text_encoder"], modules["reading_heads"], *inputs, labels)


def with_noise(text: str, rng: np.random.Generator) -> str:
    """A caption as people might write it: sometimes with an opening, sometimes with a random word.

    Tokens that occur in no caption would otherwise keep random embeddings.
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


class CaptionBatches:
    """Endless batches of captions of scenes with their labels, drawn when they are needed."""

    def __init__(self, tokenizer: Tokenizer, batch_size: int, seed: int, split: str = "train"):
        self._tokenizer, self._batch_size = tokenizer, batch_size // jax.process_count()
        self._seed, self._split, self._number = seed, split, 0
        self._nouns, self._iterator = noun_ids(tokenizer), None

    def batch(self, number: int) -> Arrays:
        first = (number * jax.process_count() + jax.process_index()) * self._batch_size
        indices = range(first, first + self._batch_size)
        scenes = [scene_at(self._seed, index, self._split) for index in indices]
        texts = []
        for index, scene in zip(indices, scenes, strict=True):
            rng = np.random.default_rng([self._seed, index, 9])
            texts.append(with_noise(caption(scene, rng), rng))
        ids, mask = trimmed(*self._tokenizer(texts))
        nouns = find_nouns(ids, self._nouns)
        labels = reading_labels(scenes)
        return {"input_ids": ids, "attention_mask": mask, "nouns": nouns, **labels}

    def __next__(self) -> Arrays:
        if self._iterator is None:
            numbers = import_grain().MapDataset.range(self._number, ENDLESS)
            self._iterator = iter(numbers.map(self.batch).to_iter_dataset())
        self._number += 1
        return next(self._iterator)

    def state(self) -> dict[str, Any]:
        return {"batch": self._number}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.close()
        self._number = int(state["batch"])

    def close(self) -> None:
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None
