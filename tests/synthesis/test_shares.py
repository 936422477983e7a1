# SPDX-License-Identifier: Apache-2.0
"""Which shards are whose, by flags and by what schedulers say."""

import pytest

from k3jax.synthesis.shares import Share, find_share


STEP = {"SLURM_STEP_ID": "0"}


def array(task, count, first, last, step=None):
    """What SLURM tells a task of an array."""
    values = {"ID": task, "COUNT": count, "MIN": first, "MAX": last, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{k}": str(v) for k, v in values.items() if v is not None}


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
                "SLURM_STEP_ID": "0",
            },
            {},
            (5, 6),
        ),
        (array(1, count=4, first=1, last=4), {}, (0, 4)),
        (array(4, count=4, first=1, last=4), {"jobs": 4}, (3, 4)),
        (array(9, count=3, first=1, last=9), {}, (2, 3)),  # --array=1,5,9
        (array(9, count=3, first=1, last=9, step=4), {}, (2, 3)),
        (array(20, count=4, first=0, last=30, step=10), {}, (2, 4)),
        # Task 3 of an array is submitted again: alone it makes all that is missing.
        (array(3, count=1, first=3, last=3), {}, (0, 1)),
        (array(3, count=1, first=3, last=3), {"job": 3, "jobs": 4}, (3, 4)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, {}, (3, 4)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, {}, (0, 4)),
        # srun -n 2 in an allocation for 4.
        (
            {**STEP, "SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "2"},
            {},
            (1, 2),
        ),
        # A batch script, and a shell of salloc: one process, whatever --ntasks says.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, {}, (0, 1)),
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_ID": str(0xFFFFFFFB)},
            {"job": 1, "jobs": 2},
            (1, 2),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_ID": str(0xFFFFFFFA)}, {}, (0, 1)),
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
        (
            {"JOB_COMPLETION_INDEX": "3"},
            {},
            "INDEX is 3, without the number of jobs",
        ),
        ({"JOB_COMPLETION_INDEX": "3"}, {"jobs": 3}, "below the number of jobs, 3"),
        ({"JOB_COMPLETION_INDEX": "x"}, {"jobs": 3}, "is 'x', which is not a number"),
        ({}, {"jobs": 3}, "--jobs is 3: give the number of this one with --job"),
        ({}, {"job": 3}, "without the number of jobs: give --jobs"),
        ({}, {"job": -1, "jobs": 3}, "must be at least 0"),
        ({"JAX_PROCESS_ID": "3"}, {}, "without the number of hosts: give --hosts"),
        # One task of an array is submitted again, whose numbers may have begun at 0 or at 1.
        (array(3, count=1, first=3, last=3), {"jobs": 4}, "which of 4 jobs this is: .* --job and"),
        (
            array(3, count=2, first=3, last=5),
            {"jobs": 8},
            "array of 2 tasks, .* of 8 jobs",
        ),
        (array(2, count=3, first=1, last=9), {}, "uneven distances"),  # --array=1,2,9
        (array(4, count=4, first=0, last=4), {}, r"uneven distances.*--array=0-3, or give --job"),
        ({"SLURM_ARRAY_TASK_ID": "3"}, {}, "an unknown number of tasks"),
        ({"SLURM_ARRAY_TASK_ID": "3"}, {"jobs": 4}, "an unknown number of tasks"),
        ({**STEP, "SLURM_PROCID": "0"}, {}, "without the number of hosts: give --hosts"),
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},
            {"hosts": 4},
            "number of this one .* --host",
        ),
    ],
)
def test_refusals(environment, flags, reason):
    with pytest.raises(ValueError, match=reason):
        find_share(environment, **flags)


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 50])
def test_every_shard_is_somebodys(workers):
    shards = [s for w in range(workers) for s in Share(w, workers, "").shards(20)]
    assert sorted(shards) == list(range(20))
