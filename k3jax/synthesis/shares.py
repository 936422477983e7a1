# SPDX-License-Identifier: Apache-2.0
"""Which shards are this process's: arithmetic on its number among jobs x hosts, no scheduler.

The number comes from flags, or from what Kubernetes, SLURM, a TPU slice or jax.distributed tell
every process they start.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """Shards `worker`, `worker + workers`, ...

    Attributes:
        reason: where the numbers come from, for people.
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
        job, jobs, host, hosts: from flags; None: as the environment says, or one of one.

    Raises:
        ValueError: a number without its count, or outside of it.
    """
    reasons = []
    host, hosts = _pair("host", host, hosts, _host(environment), reasons)
    job, jobs = _pair("job", job, jobs, _job(environment, hosts), reasons)
    reason = ", ".join(reasons) or "nothing says that there are others"
    return Share(job * hosts + host, jobs * hosts, reason)


def _job(environment, hosts: int) -> tuple[str, int, int | None] | None:
    """(where it is said, number, count or None) of this job."""
    if "SLURM_ARRAY_TASK_ID" in environment:
        task = _number(environment, "SLURM_ARRAY_TASK_ID")
        first = _number(environment, "SLURM_ARRAY_TASK_MIN", 0)
        step = _number(environment, "SLURM_ARRAY_TASK_STEP", 1)
        count = _number(environment, "SLURM_ARRAY_TASK_COUNT", None)
        return "SLURM_ARRAY_TASK_ID", (task - first) // step, count
    if "MEGASCALE_SLICE_ID" in environment:
        count = _number(environment, "MEGASCALE_NUM_SLICES", None)
        return "MEGASCALE_SLICE_ID", _number(environment, "MEGASCALE_SLICE_ID"), count
    # In a job over the hosts of one TPU slice the completion index counts these hosts.
    if "JOB_COMPLETION_INDEX" in environment and not (hosts > 1 and "TPU_WORKER_ID" in environment):
        number = _number(environment, "JOB_COMPLETION_INDEX")
        return "JOB_COMPLETION_INDEX", number, None
    return None


def _host(environment) -> tuple[str, int, int | None] | None:
    """The same of this host (or process) within its job."""
    if "JAX_PROCESS_ID" in environment:
        count = _number(environment, "JAX_NUM_PROCESSES", None)
        return "JAX_PROCESS_ID", _number(environment, "JAX_PROCESS_ID"), count
    if "SLURM_PROCID" in environment:
        count = _number(environment, "SLURM_NTASKS", 1)
        return "SLURM_PROCID", _number(environment, "SLURM_PROCID"), count
    names = [name for name in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    if "TPU_WORKER_ID" in environment and len(names) > 1:
        return "TPU_WORKER_ID", _number(environment, "TPU_WORKER_ID"), len(names)
    return None


def _pair(name, number, count, said, reasons) -> tuple[int, int]:
    source = f"--{name}"
    if number is None and said is not None:
        source, number, found = said
        count = found if count is None else count
    if number is None:
        if count not in (None, 1):
            raise ValueError(f"--{name}s is {count}: say which of them this is with --{name}.")
        return 0, 1
    if count is None:
        raise ValueError(
            f"{source} says that this is {name} {number}, but not of how many: give --{name}s."
        )
    if not 0 <= number < count:
        raise ValueError(
            f"{source} says that this is {name} {number}, which must be at least 0 and below "
            f"the number of {name}s, {count}."
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
