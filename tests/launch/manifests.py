# SPDX-License-Identifier: Apache-2.0
"""The manifests of launch/gke as data, and their commands as a cluster runs them."""

import re
from pathlib import Path

import yaml


ROOT = Path(__file__).parents[2]
GKE = ROOT / "launch" / "gke"


def manifest(name: str) -> dict:
    return yaml.safe_load((GKE / name).read_text())


def replicated_job() -> dict:
    (job,) = manifest("jobset.yaml")["spec"]["replicatedJobs"]
    return job


def job_specs() -> dict[str, dict]:
    """File -> the spec of its Job."""
    return {
        "indexed_job.yaml": manifest("indexed_job.yaml")["spec"],
        "jobset.yaml": replicated_job()["template"]["spec"],
    }


def container(job: dict) -> dict:
    (found,) = job["template"]["spec"]["containers"]
    return found


def argv(found: dict, environment: dict[str, str]) -> list[str]:
    """A container's command with the values of $(NAME), as in Kubernetes: unknown names stay."""

    def expand(word: str) -> str:
        return re.sub(r"\$\((\w+)\)", lambda m: environment.get(m[1], m[0]), word)

    return [expand(word) for word in [*found["command"], *found["args"]]]


def flag(words: list[str], name: str) -> str | None:
    """The value of --name=value."""
    values = [word.partition("=")[2] for word in words if word.startswith(f"--{name}=")]
    return values[0] if values else None
