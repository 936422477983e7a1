# SPDX-License-Identifier: Apache-2.0
"""The batches of a run: from images or from the cache, with validation and prior preservation."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from k3jax.model.tokenizer import Tokenizer
from k3jax.training.data.buckets import BucketIndex
from k3jax.training.data.latent_cache import CachedLoader, LatentCache, trimmed
from k3jax.training.data.loader import BatchIterator, Loader
from k3jax.training.data.open_source import open_source
from k3jax.training.data.order import hold_out
from k3jax.training.data.precompute import index_of
from k3jax.training.data.source import Source
from k3jax.training.train_config import TrainConfig


Arrays = dict[str, np.ndarray]
Convert = Callable[[Mapping[str, Any], int], Arrays]
"""(batch of a loader, its number) -> arrays for the loss."""


class Batches(Protocol):
    """Endless batches on the host, of this process's rows, with a position that can be saved."""

    def __next__(self) -> Arrays: ...

    def batch(self, number: int) -> Arrays: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class TrainingData:
    """The batches of a run.

    Attributes:
        batches: for training.
        validation: held-out batches, the same every time.
    """

    batches: Batches
    validation: Sequence[Arrays] = ()


def open_data(
    config: TrainConfig,
    convert: Convert,
    open_cache: Callable[[Source, BucketIndex], LatentCache] | None = None,
    convert_cached: Convert | None = None,
) -> TrainingData:
    """The batches that a config describes.

    Args:
        convert: for batches of images and captions.
        open_cache: returns the cache, and fills it before if necessary; None: read images.
        convert_cached: for batches of the cache.

    Raises:
        ValueError: data that cannot be read, or too few samples.
    """
    source = open_source(config.data, seed=config.seed)
    if config.data.crop is not None:
        data = dataclasses.replace(config.data, resolution=config.data.crop)
        config = dataclasses.replace(config, data=data)
    index = index_of(source, config.data)
    used, held_out = split_validation(len(source), config)
    size = config.batch_size
    place = (jax.process_index(), jax.process_count())
    if open_cache is not None:
        cache, shuffle = open_cache(source, index), config.data.shuffle

        def loader(samples):
            cached = CachedLoader(
                cache, size, config.seed, *place, shuffle=shuffle, samples=samples
            )
            return ConvertedBatches(cached, convert_cached)

    elif config.prior is not None:
        return TrainingData(_prior_batches(config, source, index, used, convert))
    else:

        def loader(samples):
            args = (source, config.data, size, config.seed, *place)
            return ConvertedBatches(Loader(*args, samples=samples, index=index), convert)

    validation = []
    if len(held_out):
        kept = loader(held_out)
        validation = [kept.batch(number) for number in range(config.validation_batches)]
    return TrainingData(loader(used), validation)


class ConvertedBatches:
    """A loader whose batches are converted to arrays."""

    def __init__(self, loader: BatchIterator, convert: Convert):
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

    def __init__(self, subject: ConvertedBatches, prior: ConvertedBatches, weight: float):
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


def _prior_batches(config: TrainConfig, source, index, used, convert: Convert) -> WithPrior:
    """Batches of the subject and of the class images of `config.prior`."""
    prior, size = config.prior, config.batch_size
    count = round(size * prior.share)
    if not 0 < count < size:
        raise ValueError(
            f"train.prior.share is {prior.share}, which leaves {size - count} of {size} samples to "
            "the subject: both need at least one."
        )
    data = dataclasses.replace(config.data, kind="folder", path=prior.path, cache=None)
    classes, place = open_source(data), (jax.process_index(), jax.process_count())
    subject = Loader(
        source, config.data, size - count, config.seed, *place, samples=used, index=index
    )
    others = Loader(classes, data, count, config.seed, *place, index=index_of(classes, data))
    parts = (ConvertedBatches(loader, convert) for loader in (subject, others))
    return WithPrior(*parts, prior.weight)


def tokens(captions: list[str], tokenizer: Tokenizer) -> Arrays:
    """The token ids and mask of a batch."""
    ids, mask = tokenizer(captions)
    if jax.process_count() == 1:  # else all 128 rows: other processes may have longer captions
        ids, mask = trimmed(ids, mask)
    return {"input_ids": ids, "attention_mask": mask}


def split_validation(count: int, config: TrainConfig) -> tuple[np.ndarray | None, np.ndarray]:
    """(samples for training, None for all; samples held out), by the run's seed.

    Raises:
        ValueError: too few samples.
    """
    kept = config.validation_batches * config.batch_size
    if kept == 0:
        return None, np.arange(0)
    if kept + config.batch_size > count:
        raise ValueError(
            f"{config.validation_batches} validation batches of {config.batch_size} leave less "
            f"than a batch of the {count} samples to train on: ask for fewer."
        )
    return hold_out(count, kept, config.seed)


def _widened(name: str, x: np.ndarray, width: int) -> np.ndarray:
    if name not in ("input_ids", "attention_mask", "embeds") or x.shape[1] == width:
        return x
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, width - x.shape[1])
    return np.pad(x, padding)
