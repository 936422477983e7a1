# SPDX-License-Identifier: Apache-2.0
"""Batches as the tasks want them: what the loaders read, tokenised, masked, put together."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from k3jax.model.tokenizer import Tokenizer
from k3jax.scenes.caption import caption
from k3jax.scenes.scene import scene_at
from k3jax.training.data.latent_cache import TEXT_ROWS, CachedLoader
from k3jax.training.data.loader import ENDLESS, BatchIterator, Loader, import_grain
from k3jax.training.data.order import hold_out
from k3jax.training.tasks import reading as scene_text
from k3jax.training.tasks.inpainting import draw_masks
from k3jax.training.train_config import TrainConfig


Arrays = dict[str, np.ndarray]
LATENT_CHANNELS = 4


class Converted:
    """A loader whose batches go through `convert(batch, number)` on their way."""

    def __init__(self, loader: BatchIterator, convert: Callable[[dict[str, Any], int], Arrays]):
        self._loader, self._convert = loader, convert

    def __next__(self) -> Arrays:
        number = self._loader.state()["batch"]
        return self._convert(next(self._loader), number)

    def batch(self, number: int) -> Arrays:
        return self._convert(self._loader.batch(number), number)

    def state(self) -> dict[str, Any]:
        return self._loader.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self._loader.restore(dict(state))

    def close(self) -> None:
        self._loader.close()


class WithPrior:
    """Batches of the subject, each followed by images of its class (arXiv:2208.12242)."""

    def __init__(self, subject: Converted, prior: Converted, weight: float):
        self._subject, self._prior, self._weight = subject, prior, weight

    def __next__(self) -> Arrays:
        return self._together(next(self._subject), next(self._prior))

    def batch(self, number: int) -> Arrays:
        return self._together(self._subject.batch(number), self._prior.batch(number))

    def _together(self, subject: Arrays, prior: Arrays) -> Arrays:
        rows = [len(part["attention_mask"]) for part in (subject, prior)]
        # Each part's loss is the mean over that part, so a sample weighs by the share of its part.
        weights = (sum(rows) / rows[0], self._weight * sum(rows) / rows[1])
        parts = [
            {**part, "weight": np.full(count, weight, np.float32)}
            for part, count, weight in zip((subject, prior), rows, weights, strict=True)
        ]
        width = max(part["attention_mask"].shape[1] for part in parts)
        parts = [{name: _widened(name, x, width) for name, x in part.items()} for part in parts]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def state(self) -> dict[str, Any]:
        return {"subject": self._subject.state(), "prior": self._prior.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._subject.restore(state["subject"])
        self._prior.restore(state["prior"])

    def close(self) -> None:
        self._subject.close()
        self._prior.close()


class SceneReading:
    """Captions of scenes and what they say, for `k3jax.training.tasks.reading`; drawn as they go."""

    def __init__(self, tokenizer: Tokenizer, batch_size: int, seed: int, split: str = "train"):
        self._tokenizer, self._batch_size = tokenizer, batch_size // jax.process_count()
        self._seed, self._split, self._number = seed, split, 0
        self._nouns, self._iterator = scene_text.noun_ids(tokenizer), None

    def batch(self, number: int) -> Arrays:
        first = (number * jax.process_count() + jax.process_index()) * self._batch_size
        indices = range(first, first + self._batch_size)
        scenes = [scene_at(self._seed, index, self._split) for index in indices]
        texts = []
        for index, scene in zip(indices, scenes, strict=True):
            rng = np.random.default_rng([self._seed, index, 9])
            texts.append(scene_text.disturbed(caption(scene, rng), rng))
        ids, mask = trimmed(*self._tokenizer(texts))
        nouns = scene_text.find_nouns(ids, self._nouns)
        labels = scene_text.reading_labels(scenes)
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


def trimmed(ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Only as many rows as the longest caption's window needs, of a few sizes.

    Rows outside of a caption's window take no part, so nothing changes but the time it takes.
    """
    needed = min(int(mask.sum(1).max()) + 1, TEXT_ROWS[-1])
    rows = next(n for n in TEXT_ROWS if n >= needed)
    return ids[:, :rows], mask[:, :rows]


def convert_uncached(
    config: TrainConfig, tokenizer: Tokenizer | None
) -> Callable[[dict[str, Any], int], Arrays]:
    """Images and captions of a `Loader` -> arrays; masks of batch k hang on k alone."""

    def convert(batch: dict[str, Any], number: int) -> Arrays:
        made = {"images": batch["images"]}
        if tokenizer is not None:
            # All 128 rows: how long the captions on other processes are is not known here.
            ids, mask = tokenizer(batch["captions"])
            if jax.process_count() == 1:
                ids, mask = trimmed(ids, mask)
            made |= {"input_ids": ids, "attention_mask": mask}
        if config.task == "inpainting":
            rng = np.random.default_rng([config.seed, number, jax.process_index()])
            made["masks"] = draw_masks(batch["images"], rng, config.masks)
        return made

    return convert


def convert_cached(batch: dict[str, Any], number: int) -> Arrays:
    """What a `CachedLoader` gives -> arrays; see `k3jax.training.data.precompute` on inpainting."""
    latents = np.asarray(batch["latents"], np.float32)
    made = {"embeds": batch["embeds"], "attention_mask": batch["attention_mask"]}
    if latents.shape[-1] == LATENT_CHANNELS:
        return {**made, "latents": latents}
    c = LATENT_CHANNELS
    return {
        **made,
        "latents": latents[..., :c],
        "mask": latents[..., c : c + 1],
        "masked_latents": latents[..., c + 1 :],
    }


def split_validation(count: int, config: TrainConfig) -> tuple[np.ndarray | None, np.ndarray]:
    """(samples to train on, None for all; samples held out), by the run's seed.

    Raises:
        ValueError: not enough samples for that.
    """
    wanted = config.validation_batches * config.batch_size
    if wanted == 0:
        return None, np.arange(0)
    if wanted + config.batch_size > count:
        raise ValueError(
            f"{config.validation_batches} validation batches of {config.batch_size} leave less "
            f"than a batch of the {count} samples to train on: ask for fewer."
        )
    return hold_out(count, wanted, config.seed)


def make_loader(
    config: TrainConfig,
    source: Any,
    index: Any,
    tokenizer: Tokenizer | None,
    batch_size: int,
    samples: np.ndarray | None = None,
) -> Converted:
    """Batches that are read and decoded as they are needed."""
    place = (jax.process_index(), jax.process_count())
    loader = Loader(
        source, config.data, batch_size, config.seed, *place, samples=samples, index=index
    )
    return Converted(loader, convert_uncached(config, tokenizer))


def make_cached_loader(
    config: TrainConfig, cache: Any, batch_size: int, samples: np.ndarray | None = None
) -> Converted:
    """Batches of latents and embeddings that were computed beforehand."""
    place = (jax.process_index(), jax.process_count())
    shuffle = config.data.shuffle
    loader = CachedLoader(cache, batch_size, config.seed, *place, shuffle=shuffle, samples=samples)
    return Converted(loader, convert_cached)


def prior_config(config: TrainConfig) -> TrainConfig:
    """The run's config with the class images as its data."""
    data = dataclasses.replace(config.data, kind="folder", path=config.prior.path, cache=None)
    return dataclasses.replace(config, data=data)


def _widened(name: str, x: np.ndarray, width: int) -> np.ndarray:
    if name not in ("input_ids", "attention_mask", "embeds") or x.shape[1] == width:
        return x
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, width - x.shape[1])
    return np.pad(x, padding)
