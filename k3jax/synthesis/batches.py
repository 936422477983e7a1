# SPDX-License-Identifier: Apache-2.0
"""The samples of a shard as batches of one compiled shape each."""

from collections.abc import Sequence
from dataclasses import dataclass

from k3jax.sampling.samplers import Sampler, steps_of_strength
from k3jax.synthesis.samples import Operation, Sample


@dataclass(frozen=True)
class BatchKind:
    """What samples must share to be computed by one program.

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
    """Samples that one call of a pipeline computes."""

    kind: BatchKind
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class ShardBatches:
    """A shard, as samples and as batches.

    Attributes:
        samples: all of the shard, in the order of the prompts.
        batches: of the samples without a fault. A shard holds its images in the order of its
            batches: kind by kind, and within a kind in the order of the prompts, so that the order
            does not depend on the batch size.
    """

    shard: int
    samples: tuple[Sample, ...]
    batches: tuple[Batch, ...]


def batch_shard(
    shard: int, samples: Sequence[Sample], batch_size: int, sampler: Sampler
) -> ShardBatches:
    """The batches of a shard. The sampler decides on the number of steps and on guidance."""
    kinds: dict[BatchKind, list[Sample]] = {}
    for sample in samples:
        if sample.fault is None:
            kinds.setdefault(kind_of(sample, sampler), []).append(sample)
    batches = [
        Batch(kind, tuple(members[first : first + batch_size]))
        for kind, members in kinds.items()
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


def texts_of(shard: ShardBatches) -> list[str]:
    """Every text that a shard needs encoded, once, in the order in which they first occur."""
    texts = {}
    for batch in shard.batches:
        for sample in batch.samples:
            texts[sample.prompt] = None
            if batch.kind.negative:
                texts[sample.negative_prompt] = None
    return list(texts)
