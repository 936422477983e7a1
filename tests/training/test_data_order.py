# SPDX-License-Identifier: Apache-2.0
"""The order of batches: what it promises, without images."""

import collections
import itertools
import pickle

import numpy as np
import pytest

from k3jax.training.data.order import Order, hold_out


BUCKETS = np.random.default_rng(0).choice(4, 103, p=[0.6, 0.3, 0.08, 0.02])


def batches(order: Order, count: int, first: int = 0) -> list[list[int]]:
    return [order.batch(number).tolist() for number in range(first, first + count)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch_size", [1, 8, 64, 300])
def test_every_sample_is_seen_once_an_epoch_but_for_the_remainder(batch_size, shuffle):
    order = Order(BUCKETS, batch_size, seed=3, shuffle=shuffle)
    number, seen = 0, collections.Counter()
    for epoch in range(6):
        while order.epoch_of(number) == epoch:
            batch = order.batch(number)
            assert len(set(BUCKETS[batch])) == 1
            seen.update(batch.tolist())
            number += 1
        assert max(seen.values(), default=0) <= epoch + 1
        for bucket in range(4):
            members = np.flatnonzero(BUCKETS == bucket).tolist()
            waiting = (epoch + 1) * len(members) - sum(seen[m] for m in members)
            assert 0 <= waiting < batch_size


def test_samples_are_in_another_order_each_epoch_and_with_each_seed():
    order = Order(np.zeros(40, int), 40, seed=0)
    first, second = batches(order, 2)
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second
    assert batches(Order(np.zeros(40, int), 40, seed=1), 1) != [first]
    assert batches(Order(np.zeros(40, int), 40, seed=0, shuffle=False), 1) == [list(range(40))]


def test_buckets_are_mixed_within_an_epoch():
    order = Order(np.arange(400) % 2, 4, seed=0)
    kinds = [batch[0] % 2 for batch in batches(order, 100)]
    assert kinds.count(0) == kinds.count(1) == 50
    assert 20 < sum(a != b for a, b in itertools.pairwise(kinds)) < 80


def test_batches_can_be_had_in_any_order_and_from_another_process():
    order = Order(BUCKETS, 8, seed=5)
    forward = batches(order, 60)
    other = pickle.loads(pickle.dumps(order))
    assert [other.batch(n).tolist() for n in reversed(range(60))] == forward[::-1]


def test_the_order_does_not_change_between_versions():
    # Runs that resume after an upgrade depend on it.
    assert batches(Order(np.array([0, 0, 1, 0, 1, 0, 0]), 2, seed=7), 5) == GOLDEN


def test_held_out_samples_are_others():
    train, validation = hold_out(100, 10, seed=1)
    assert len(train) == 90 and len(validation) == 10
    assert sorted([*train, *validation]) == list(range(100))
    assert validation.tolist() != hold_out(100, 10, seed=2)[1].tolist()
    with pytest.raises(ValueError, match="5 of 5 samples cannot be held out"):
        hold_out(5, 5, seed=0)


def test_faults():
    with pytest.raises(ValueError, match="no samples"):
        Order(np.zeros(0, int), 4, 0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        Order(BUCKETS, 0, 0)
    with pytest.raises(ValueError, match="seed is -1"):
        Order(BUCKETS, 4, -1)


GOLDEN = [[2, 4], [3, 1], [6, 5], [6, 5], [4, 2]]
