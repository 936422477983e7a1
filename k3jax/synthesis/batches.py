# SPDX-License-Identifier: Apache-2.0
"""The samples of a shard as batches of one compiled shape each."""

from collections.abc import Sequence
from dataclasses import dataclass

from k3jax.sampling.samplers import Sampler
from k3jax.sampling.strength import steps_of_strength
from k3jax.synthesis.samples import Operation, Sample


@dataclass(frozen=True)
class BatchKind:
    """What samples must share to be made by one program.

    Attributes:
        guided: with guidance, at two forward passes a step.
        negative: with negative prompts.
        operation, steps: see `Sample.operation`; the steps that run, which `strength` reduces.
    """

    width: int
    height: int
    guided: bool
    negative: bool
    operation: Operation
    steps: int


@dataclass(frozen=True)
class Batch:
    bucket: BatchKind
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class ShardBatches:
    """
    Attributes:
        samples: all of the shard, in the order of the prompts.
        batches: those that can be made. A shard holds its images in the order of its batches:
            bucket by bucket, and within one in the order of the prompts, whatever the batch size.
    """

    shard: int
    samples: tuple[Sample, ...]
    batches: tuple[Batch, ...]


def batch_shard(
    shard: int, samples: Sequence[Sample], batch_size: int, sampler: Sampler
) -> ShardBatches:
    """The batches of a shard. A sampler may make steps of its own number, or never guide."""
    buckets: dict[BatchKind, list[Sample]] = {}
    for sample in samples:
        if sample.fault is None:
            buckets.setdefault(kind_of(sample, sampler), []).append(sample)
    batches = [
        Batch(bucket, tuple(members[first : first + batch_size]))
        for bucket, members in buckets.items()
        for first in range(0, len(members), batch_size)
    ]
    return ShardBatches(shard, tuple(samples), tuple(batches))


def kind_of(sample: Sample, sampler: Sampler) -> BatchKind:
    guided = sampler.guided and sample.guidance_scale > 0
    negative = guided and sample.negative_prompt is not None
    steps = sampler.num_steps
    if sample.strength is not None:
        steps = steps_of_strength(sample.strength, steps)
    return BatchKind(sample.width, sample.height, guided, negative, sample.operation, steps)


def texts_of(plan: ShardBatches) -> list[str]:
    """Every text that a shard needs encoded, once, in the order in which they first occur."""
    texts = {}
    for batch in plan.batches:
        for sample in batch.samples:
            texts[sample.prompt] = None
            if batch.bucket.negative:
                texts[sample.negative_prompt] = None
    return list(texts)
