# SPDX-License-Identifier: Apache-2.0
"""Ids, keys, seeds and size buckets."""

import itertools
import re

import pytest

from k3jax.config import SamplerConfig
from k3jax.sampling.samplers import make_sampler
from k3jax.synthesis.batches import batch_shard, texts_of
from k3jax.synthesis.samples import MAX_SEED, RowRules, Sample, derived_seed, key_of, nearest_size


GUIDED = make_sampler(SamplerConfig())
FLASH = make_sampler(SamplerConfig(name="flash", num_inference_steps=4))
ODD_IDS = [
    "plain-id_7",
    "a/b/../c.d",
    "/etc/passwd",
    "..",
    ".hidden",
    "with space",
    "%2F",
    "кот",
    "猫" * 100,
    "x" * 300,
    "x" * 301,
    "<b>\"'&",
    "con:nul\\",
    "A",
    "a",
]


def test_keys_are_one_to_one_and_safe():
    keys = [key_of(name) for name in ODD_IDS]
    assert len(set(keys)) == len(ODD_IDS)
    for key in keys:
        assert re.fullmatch(r"[A-Za-z0-9_%~-]{1,80}", key)
    assert key_of("plain-id_7") == "plain-id_7" and key_of("a/b.c") == "a%2Fb%2Ec"


def test_seeds():
    """A function of the run's seed and the id, written down here for ever."""
    assert derived_seed(0, "000000001") == 5_138_246_338_364_110_322
    assert derived_seed(1, "000000001") != derived_seed(0, "000000001")
    seeds = {derived_seed(0, f"{k}") for k in range(10_000)}
    assert len(seeds) == 10_000 and max(seeds) <= MAX_SEED


def test_images_of_a_prompt():
    rules = RowRules(3, 4, 64, 64, 1.0, "dull", 64)
    samples = list(rules.expand(rules.sample({"prompt": "a", "seed": 7}, "line", 5, 9)))
    assert [s.id for s in samples] == ["line-0", "line-1", "line-2", "line-3"]
    assert [s.index for s in samples] == [20, 21, 22, 23]
    assert [s.seed for s in samples] == [7, 8, 9, 10]  # as `num_images_per_prompt` counts
    assert {s.negative_prompt for s in samples} == {"dull"}
    samples = list(rules.expand(rules.sample({"prompt": "a"}, "line", 5, 9)))
    assert [s.seed for s in samples] == [derived_seed(3, f"line-{k}") for k in range(4)]
    bad = list(rules.expand(Sample(5, "line", 9, fault="not JSON")))
    assert [s.index for s in bad] == [20, 21, 22, 23] and bad[0].fault == "not JSON"


@pytest.mark.parametrize(
    "size, bucket",
    [
        ((100, 100), (1024, 1024)),
        ((512, 512), (512, 512)),
        ((1920, 1080), (1344, 768)),
        ((1080, 1920), (768, 1344)),
        ((1000, 900), (1024, 1024)),
    ],
)
def test_buckets(size, bucket):
    buckets = ((1024, 1024), (512, 512), (1344, 768), (768, 1344))
    if size == (100, 100):
        buckets = buckets[:1] + buckets[2:]
    assert nearest_size(buckets, *size) == bucket


def test_a_plan_has_few_shapes():
    """Batches of one size, with and without guidance; each text is encoded once."""

    def sample(index, **values):
        defaults = {"prompt": f"p{index % 3}", "width": 64, "height": 64, "guidance_scale": 2.0}
        return Sample(index, str(index), index, **{**defaults, **values})

    samples = [sample(k) for k in range(5)]
    samples += [sample(5, width=128), sample(6, guidance_scale=0.0, negative_prompt="n")]
    samples += [sample(7, negative_prompt="n"), sample(8, fault="bad"), sample(9)]
    plan = batch_shard(3, samples, 4, GUIDED)
    made = [[s.index for s in batch.samples] for batch in plan.batches]
    assert made == [[0, 1, 2, 3], [4, 9], [5], [6], [7]]
    assert len({batch.kind for batch in plan.batches}) == 4
    assert texts_of(plan) == ["p0", "p1", "p2", "n"]
    assert len({b.kind for b in batch_shard(3, samples, 4, FLASH).batches}) == 2
    one = [[s.index for s in b.samples] for b in batch_shard(3, samples, 1, GUIDED).batches]
    # The order in the shard does not depend on the batch.
    assert list(itertools.chain(*one)) == list(itertools.chain(*made))
