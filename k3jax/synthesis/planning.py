# SPDX-License-Identifier: Apache-2.0
"""The samples of a shard as batches of one compiled shape each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from k3jax.sampling.samplers import Sampler, steps_of_strength
from k3jax.synthesis.image_task import Task, task_of
from k3jax.synthesis.layout import Layout
from k3jax.synthesis.prompt_source import PromptIndex, PromptSource
from k3jax.synthesis.samples import RowRules, Sample


@dataclass(frozen=True)
class Bucket:
    """What samples must share to be made by one program.

    Attributes:
        guided: with guidance, at two forward passes a step.
        negative: with negative prompts.
        task, steps: what is made of images, in how many steps; see image_task.py.
    """

    width: int
    height: int
    guided: bool
    negative: bool
    task: Task
    steps: int


@dataclass(frozen=True)
class Batch:
    bucket: Bucket
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class ShardPlan:
    """
    Attributes:
        samples: all of the shard, in the order of the prompts.
        batches: those that can be made. A shard holds its images in the order of its batches:
            bucket by bucket, and within one in the order of the prompts, whatever the batch size.
    """

    shard: int
    samples: tuple[Sample, ...]
    batches: tuple[Batch, ...]


def read_samples(
    source: PromptSource, index: PromptIndex, rules: RowRules, layout: Layout, shard: int
) -> Iterator[Sample]:
    """The samples of a shard, read where their lines stand."""
    first, stop = layout.range(shard)
    per_row = rules.images_per_prompt
    for number, line, default_id, row in source.rows(index, first // per_row, -(-stop // per_row)):
        if isinstance(row, str):
            samples = rules.bad_samples(row, default_id, number, line)
        else:
            samples = rules.samples(row, number, line)
        yield from (sample for sample in samples if first <= sample.index < stop)


def plan_shard(
    shard: int, samples: Sequence[Sample], batch_size: int, sampler: Sampler
) -> ShardPlan:
    """The batches of a shard. A sampler may make steps of its own number, or never guide."""
    buckets: dict[Bucket, list[Sample]] = {}
    for sample in samples:
        if sample.fault is None:
            buckets.setdefault(bucket_of(sample, sampler), []).append(sample)
    batches = [
        Batch(bucket, tuple(members[first : first + batch_size]))
        for bucket, members in buckets.items()
        for first in range(0, len(members), batch_size)
    ]
    return ShardPlan(shard, tuple(samples), tuple(batches))


def bucket_of(sample: Sample, sampler: Sampler) -> Bucket:
    guided = sampler.guided and sample.guidance_scale > 0
    negative = guided and sample.negative_prompt is not None
    steps = sampler.num_steps
    if sample.strength is not None:
        steps = steps_of_strength(sample.strength, steps)
    return Bucket(sample.width, sample.height, guided, negative, task_of(sample), steps)


def texts_of(plan: ShardPlan) -> list[str]:
    """Every text that a shard needs encoded, once, in the order in which they first occur."""
    texts = {}
    for batch in plan.batches:
        for sample in batch.samples:
            texts[sample.prompt] = None
            if batch.bucket.negative:
                texts[sample.negative_prompt] = None
    return list(texts)
