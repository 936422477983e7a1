# SPDX-License-Identifier: Apache-2.0
"""The lane lint: scripts, the Dockerfile and manifests, by their linters and published schemas."""

import json
import subprocess
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest

from manifests import GKE, ROOT, manifest, replicated_job
from tools import needs_tool


SCRIPTS = sorted([*(ROOT / "launch").rglob("*.sh"), *(ROOT / "launch").rglob("*.sbatch")])
SCRIPTS += [ROOT / ".ci" / "run"]
KUBERNETES = ("1.33", kubernetes_validate.latest_version())
"""From the oldest with everything that is used (backoffLimitPerIndex is stable there)."""
JOBSET = jsonschema.Draft202012Validator(
    json.loads((Path(__file__).parent / "jobset_schema.json").read_text())
)

pytestmark = pytest.mark.lint


def lint(*words):
    program = needs_tool(words[0], install="pip install -e '.[test]'")
    done = subprocess.run([program, *words[1:]], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_script_is_checked():
    assert {path.name for path in SCRIPTS} >= {"tpu_vm.sh", "slurm.sbatch", "run"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(path: Path):
    lint("shellcheck", str(path))


def test_hadolint():
    lint("hadolint", "--failure-threshold", "style", str(GKE / "Dockerfile"))


def check_job(job):
    for version in KUBERNETES:
        kubernetes_validate.validate(job, version, strict=True)


def test_indexed_job_is_valid():
    check_job(manifest("indexed_job.yaml"))


def test_jobset_is_valid():
    """By the schema of JobSet, and the Job inside by that of Job."""
    JOBSET.validate(manifest("jobset.yaml"))
    template = replicated_job()["template"]
    name = {"name": "k3jax-slice-0"}
    check_job({"apiVersion": "batch/v1", "kind": "Job", "metadata": name, **template})


@pytest.mark.parametrize("key", ["backofLimit", "podFailurePolicies"])
def test_a_misspelt_key_is_refused(key):
    job = manifest("indexed_job.yaml")
    job["spec"][key] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        check_job(job)


def test_a_misspelt_key_of_jobset_is_refused():
    jobset = manifest("jobset.yaml")
    jobset["spec"]["failurePolicy"]["maxRestart"] = 1
    with pytest.raises(jsonschema.ValidationError):
        JOBSET.validate(jobset)
