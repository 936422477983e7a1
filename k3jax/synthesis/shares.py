# SPDX-License-Identifier: Apache-2.0
"""The share of the shards that a process makes: arithmetic on its number among jobs x hosts.

The number comes from flags, or from the variables that Kubernetes, SLURM, a TPU slice or
jax.distributed set for every process that they start.
"""

from collections.abc import Mapping
from dataclasses import dataclass


FIRST_STEP_WITHOUT_SRUN = 0xFFFFFFF0
"""Numbers of SLURM's steps from here on mean batch scripts, interactive shells and the like."""


@dataclass(frozen=True)
class Share:
    """Shards `worker`, `worker + workers`, ...

    Attributes:
        reason: where the numbers come from, as text.
    """

    worker: int
    workers: int
    reason: str

    def shards(self, count: int) -> range:
        return range(self.worker, count, self.workers)


def find_share(
    environment: Mapping[str, str],
    job: int | None = None,
    jobs: int | None = None,
    host: int | None = None,
    hosts: int | None = None,
) -> Share:
    """The share of this process: host `host` of `hosts` in job `job` of `jobs`.

    Args:
        environment: os.environ.
        job, jobs, host, hosts: from flags; None: from the environment, or one of one.

    Raises:
        ValueError: a number without its count, or outside of it; or one that does not follow
            from the environment.
    """
    reasons = []
    place = _host(environment, reasons) if host is None else None
    host, hosts = _pair("host", host, hosts, place, reasons)
    place = _job(environment, hosts, jobs) if job is None else None
    job, jobs = _pair("job", job, jobs, place, reasons)
    reason = ", ".join(reasons) or "the only process"
    return Share(job * hosts + host, jobs * hosts, reason)


def _job(environment, hosts: int, jobs: int | None) -> tuple[str, int, int | None] | None:
    """(variable, number, count or None) of this job.

    Args:
        jobs: from the flag.
    """
    if "SLURM_ARRAY_TASK_ID" in environment:
        return "SLURM_ARRAY_TASK_ID", *_array_place(environment, jobs)
    if "MEGASCALE_SLICE_ID" in environment:
        count = _number(environment, "MEGASCALE_NUM_SLICES", None)
        return "MEGASCALE_SLICE_ID", _number(environment, "MEGASCALE_SLICE_ID"), count
    # In a job over the hosts of one TPU slice the completion index counts these hosts.
    if "JOB_COMPLETION_INDEX" in environment and not (hosts > 1 and "TPU_WORKER_ID" in environment):
        number = _number(environment, "JOB_COMPLETION_INDEX")
        return "JOB_COMPLETION_INDEX", number, None
    return None


def _array_place(environment, jobs: int | None) -> tuple[int, int]:
    """(place of this task in its SLURM array, from 0; how many tasks that has).

    An array may start anywhere and leave out numbers evenly (--array=1,5,9 or 0-30:10). A part of
    an array that is submitted again counts only its own tasks: if --jobs is larger, it is
    unknown whether the first array began at 0 or at 1.

    Raises:
        ValueError: the place is ambiguous.
    """
    task = _number(environment, "SLURM_ARRAY_TASK_ID")
    count = _number(environment, "SLURM_ARRAY_TASK_COUNT", None)
    first = _number(environment, "SLURM_ARRAY_TASK_MIN", 0)
    step = _number(environment, "SLURM_ARRAY_TASK_STEP", 1)
    last = _number(environment, "SLURM_ARRAY_TASK_MAX", first + ((count or 1) - 1) * step)
    if count is None or jobs not in (None, count):
        tasks = "an unknown number of" if count is None else count
        shares = "how many jobs there are" if jobs is None else f"{jobs} jobs"
        raise ValueError(
            f"SLURM_ARRAY_TASK_ID is {task} in an array of {tasks} tasks, so that it is unknown "
            f"which of {shares} this is: give its number from 0, and how many there are, with "
            "--job and --jobs."
        )
    gap, uneven = divmod(last - first, max(count - 1, 1))
    place, between = divmod(task - first, max(gap, 1))
    if uneven or between or not 0 <= place < count:
        raise ValueError(
            f"SLURM_ARRAY_TASK_ID is {task} of {count} tasks from {first} to {last} at uneven "
            "distances, so that it is unknown which of them this is: submit an array such as "
            f"--array=0-{count - 1}, or give --job and --jobs."
        )
    return place, count


def _host(environment, reasons) -> tuple[str, int, int | None] | None:
    """The same of this host (or process) within its job."""
    if "JAX_PROCESS_ID" in environment:
        count = _number(environment, "JAX_NUM_PROCESSES", None)
        return "JAX_PROCESS_ID", _number(environment, "JAX_PROCESS_ID"), count
    if "SLURM_PROCID" in environment:
        number = _number(environment, "SLURM_PROCID")
        count = _number(environment, "SLURM_NTASKS", None)
        if number > 0 or _in_srun(environment):
            return "SLURM_PROCID", number, _number(environment, "SLURM_STEP_NUM_TASKS", count)
        # A batch script is one process, whatever --ntasks is: nobody starts the others.
        if count not in (None, 1):
            reasons.append(f"SLURM_NTASKS is {count}, but srun did not start this process: alone")
        return None
    names = [name for name in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    if "TPU_WORKER_ID" in environment and len(names) > 1:
        return "TPU_WORKER_ID", _number(environment, "TPU_WORKER_ID"), len(names)
    return None


def _in_srun(environment) -> bool:
    """Whether srun started this process: batch scripts and shells of salloc have no step."""
    step = _number(environment, "SLURM_STEP_ID", None)
    return step is not None and step < FIRST_STEP_WITHOUT_SRUN


def _pair(name, number, count, place, reasons) -> tuple[int, int]:
    source = f"--{name}"
    if number is None and place is not None:
        source, number, known = place
        count = known if count is None else count
    if number is None:
        if count not in (None, 1):
            raise ValueError(f"--{name}s is {count}: give the number of this one with --{name}.")
        return 0, 1
    if count is None:
        raise ValueError(f"{source} is {number}, without the number of {name}s: give --{name}s.")
    if not 0 <= number < count:
        raise ValueError(
            f"{source} is {number}; it must be at least 0 and below the number of {name}s, {count}."
        )
    if count > 1:
        reasons.append(f"{name} {number} of {count} by {source}")
    return number, count


def _number(environment, name: str, *default):
    text = environment.get(name)
    if text is None and default:
        return default[0]
    try:
        return int(text)
    except (TypeError, ValueError):
        raise ValueError(f"the variable {name} is {text!r}, which is not a number.") from None
