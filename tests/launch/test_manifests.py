# SPDX-License-Identifier: Apache-2.0
"""The manifests of launch/gke agree with the command line, with each other and with the README.

test_linters.py checks them against the published schemas.
"""

import re

import pytest

from k3jax.cli.main import parse
from k3jax.synthesis.shares import find_share

from manifests import GKE, argv, container, flag, job_specs, replicated_job


JOBS = job_specs()


@pytest.mark.parametrize("name", JOBS)
def test_pods_have_time_to_stop(name):
    pod = JOBS[name]["template"]["spec"]
    grace = float(flag(container(JOBS[name])["args"], "grace"))
    assert grace < pod["terminationGracePeriodSeconds"]
    # The API requires it with a podFailurePolicy; no schema contains it.
    assert pod["restartPolicy"] == "Never"


@pytest.mark.parametrize("name", JOBS)
def test_pods_are_not_root_and_request_their_limit_of_chips(name):
    pod = JOBS[name]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    resources = container(JOBS[name])["resources"]
    assert resources["requests"]["google.com/tpu"] == resources["limits"]["google.com/tpu"]


@pytest.mark.parametrize("name", JOBS)
def test_everything_is_in_the_bucket(name):
    found = container(JOBS[name])
    variables = {entry["name"]: entry.get("value") for entry in found["env"]}
    assert variables["JAX_COMPILATION_CACHE_DIR"].startswith("gs://YOUR-BUCKET/")
    assert [word for word in found["args"] if word.startswith("gs://")][1:] == [
        "gs://YOUR-BUCKET/pictures"
    ]
    assert flag(found["args"], "checkpoint").startswith("gs://YOUR-BUCKET/")


@pytest.mark.parametrize("name", JOBS)
def test_k3jax_understands_its_arguments(name):
    words = argv(container(JOBS[name]), {"JOB_INDEX": "0", "JOB_COMPLETION_INDEX": "1"})
    args = parse(words[words.index("k3jax") + 1 :])
    assert args.command == "synthesize"
    assert args.output == "gs://YOUR-BUCKET/pictures"


def shares(jobs, hosts, name):
    """(worker, workers) of each pod, from its command and its environment."""
    found = []
    for job in range(jobs):
        for index in range(hosts):
            labels = {"JOB_INDEX": str(job), "JOB_COMPLETION_INDEX": str(index)}
            words = argv(container(JOBS[name]), labels)
            # The environment of GKE, overridden by `env` of the command.
            given = {
                "JOB_COMPLETION_INDEX": str(index),
                "TPU_WORKER_ID": str(index),
                "TPU_WORKER_HOSTNAMES": ",".join(f"host-{k}" for k in range(hosts)),
            }
            before = words[: words.index("k3jax")]
            given |= dict(word.split("=", 1) for word in before if "=" in word)
            args = parse(words[words.index("k3jax") + 1 :])
            share = find_share(given, args.job, args.jobs, args.host, args.hosts)
            found.append((share.worker, share.workers))
    return found


def test_every_pod_of_the_jobset_has_its_own_share():
    """And the numbers of the manifest equal those of its flags."""
    slices, hosts = replicated_job()["replicas"], JOBS["jobset.yaml"]["completions"]
    assert JOBS["jobset.yaml"]["parallelism"] == hosts  # a slice needs all of its hosts
    workers = slices * hosts
    assert shares(slices, hosts, "jobset.yaml") == [(k, workers) for k in range(workers)]


def test_every_pod_of_the_indexed_job_has_its_own_share():
    """Its pods are single hosts: GKE sets no variables about other hosts."""
    count = JOBS["indexed_job.yaml"]["completions"]
    for index in range(count):
        words = argv(container(JOBS["indexed_job.yaml"]), {})
        args = parse(words[1:])
        given = {"JOB_COMPLETION_INDEX": str(index), "TPU_WORKER_ID": "0"}
        share = find_share(given, args.job, args.jobs, args.host, args.hosts)
        assert (share.worker, share.workers) == (index, count)


def test_the_xpk_line_runs_the_command_of_the_jobset():
    """Same variables and arguments, except for the numbers of the host and two slices."""
    line = re.search(r"--command '(.*)'", (GKE / "README.md").read_text())[1]
    found = container(JOBS["jobset.yaml"])
    words = line.split(" ")
    isolation = found["command"][: found["command"].index("k3jax")]
    assert words[: len(isolation)] == isolation
    ours = parse(argv(found, {"JOB_INDEX": "0", "JOB_COMPLETION_INDEX": "0"})[len(isolation) + 1 :])
    theirs = words[words.index("k3jax") + 1 :]
    theirs = ["0" if word.startswith("$") else word for word in theirs]
    assert vars(parse(theirs)) == {**vars(ours), "jobs": 2}
