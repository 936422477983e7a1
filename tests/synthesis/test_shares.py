# SPDX-License-Identifier: Apache-2.0
"""Which shards are whose, by flags and by what schedulers say."""

import pytest

from k3jax.synthesis.shares import Share, find_share


SLICE = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b,c,d"}


@pytest.mark.parametrize(
    "environment, flags, expected",
    [
        ({}, {}, (0, 1)),
        ({}, {"job": 2, "jobs": 3}, (2, 3)),
        ({}, {"job": 2, "jobs": 3, "host": 1, "hosts": 4}, (9, 12)),
        ({"JOB_COMPLETION_INDEX": "3"}, {"jobs": 8}, (3, 8)),
        ({"JOB_COMPLETION_INDEX": "3"}, {"job": 1, "jobs": 8}, (1, 8)),
        ({"JOB_COMPLETION_INDEX": "3", "TPU_WORKER_ID": "0"}, {"jobs": 8}, (3, 8)),
        # A job over the hosts of a slice: the index is that of the host.
        ({"JOB_COMPLETION_INDEX": "1", **SLICE}, {}, (1, 4)),
        ({"JOB_COMPLETION_INDEX": "1", **SLICE}, {"job": 1, "jobs": 2}, (5, 8)),
        ({**SLICE, "MEGASCALE_SLICE_ID": "2", "MEGASCALE_NUM_SLICES": "3"}, {}, (9, 12)),
        ({"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_COUNT": "5"}, {}, (4, 5)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "14",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_ARRAY_TASK_MIN": "10",
                "SLURM_ARRAY_TASK_STEP": "2",
                "SLURM_PROCID": "1",
                "SLURM_NTASKS": "2",
            },
            {},
            (5, 6),
        ),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, {}, (3, 4)),
        ({"JAX_PROCESS_ID": "1", "JAX_NUM_PROCESSES": "2"}, {}, (1, 2)),
        ({"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}, {}, (0, 1)),
    ],
)
def test_shares(environment, flags, expected):
    share = find_share(environment, **flags)
    assert (share.worker, share.workers) == expected


@pytest.mark.parametrize(
    "environment, flags, reason",
    [
        ({"JOB_COMPLETION_INDEX": "3"}, {}, "JOB_COMPLETION_INDEX says that this is job 3, but no"),
        ({"JOB_COMPLETION_INDEX": "3"}, {"jobs": 3}, "below the number of jobs, 3"),
        ({"JOB_COMPLETION_INDEX": "x"}, {"jobs": 3}, "is 'x', which is not a number"),
        ({}, {"jobs": 3}, "--jobs is 3: say which of them this is with --job"),
        ({}, {"job": 3}, "not of how many: give --jobs"),
        ({}, {"job": -1, "jobs": 3}, "must be at least 0"),
        ({"JAX_PROCESS_ID": "3"}, {}, "not of how many: give --hosts"),
    ],
)
def test_refusals(environment, flags, reason):
    with pytest.raises(ValueError, match=reason):
        find_share(environment, **flags)


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 50])
def test_every_shard_is_somebodys(workers):
    shards = [s for w in range(workers) for s in Share(w, workers, "").shards(20)]
    assert sorted(shards) == list(range(20))
