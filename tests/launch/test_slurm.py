# SPDX-License-Identifier: Apache-2.0
"""launch/slurm.sbatch, with an srun that records its arguments or starts two processes."""

import os
import socket
import subprocess
import sys
import textwrap

import pytest

from manifests import ROOT


SCRIPT = ROOT / "launch" / "slurm.sbatch"
NOTE = """#!/bin/bash
printf '%s\\n' "$@" > "$TEST/srun"
exit "$(cat "$TEST/code" 2>/dev/null || echo 0)"
"""
SYNTHESIZE = ["synthesize", "prompts.txt", "out", "--negative-prompt", "it's  bad"]
TRAIN = ["train", "--config", "finetune", "--mesh", "fsdp=-1"]


@pytest.fixture
def submit(tmp_path):
    """(arguments, variables) -> (finished script, words that srun was given)."""

    def write(name, text):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    write("srun", NOTE)
    write("k3jax", "#!/bin/bash\n")
    write("scontrol", '#!/bin/bash\necho "$@" > "$TEST/scontrol"\n')

    def call(*words, **variables):
        variables = {"SLURM_JOB_ID": "77", "TEST": str(tmp_path), **variables}
        done = subprocess.run(
            ["bash", SCRIPT, *words],
            env=os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"} | variables,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=120,
        )
        given = tmp_path / "srun"
        return done, given.read_text().splitlines() if given.exists() else None

    call.write, call.folder = write, tmp_path
    return call


@pytest.mark.parametrize("layout, nodes", [("array", "1"), ("nodes", "4")])
def test_shares(submit, layout, nodes):
    done, given = submit(*SYNTHESIZE, LAYOUT=layout, SLURM_JOB_NUM_NODES=nodes)
    assert done.returncode == 0, done.stderr
    expected = ["--kill-on-bad-exit=0", "--wait=0", "k3jax", *SYNTHESIZE, "--grace", "75"]
    assert given == expected


def test_ones_own_grace_stays(submit):
    _, given = submit(*SYNTHESIZE, "--grace=5")
    assert given[-1] == "--grace=5" and "75" not in given


@pytest.mark.parametrize(
    "words, layout, code, again",
    [
        (SYNTHESIZE, "array", 143, True),
        (SYNTHESIZE, "array", 2, False),
        (SYNTHESIZE, "array", 0, False),
        (TRAIN, "mesh", 1, False),  # at once: not for the time limit
    ],
)
def test_the_time_limit_is_another_turn(submit, words, layout, code, again):
    (submit.folder / "code").write_text(str(code))
    done, _ = submit(*words, LAYOUT=layout)
    assert done.returncode == code
    asked = submit.folder / "scontrol"
    assert asked.exists() == again
    assert not again or asked.read_text() == "requeue 77\n"


@pytest.mark.parametrize(
    "words, variables, reason",
    [
        ([], {}, "give the arguments of k3jax"),
        (SYNTHESIZE, {"LAYOUT": "ring"}, "LAYOUT is 'ring'"),
        (SYNTHESIZE, {"LAYOUT": "mesh"}, "LAYOUT=mesh is for train, not for synthesize"),
        (TRAIN, {}, "LAYOUT=array is for synthesize, not for train"),
        (SYNTHESIZE, {"SLURM_JOB_NUM_NODES": "4"}, "--nodes=1, not 4"),
    ],
)
def test_bad_input_is_answered_in_one_sentence(submit, words, variables, reason):
    done, given = submit(*words, **variables)
    assert (done.returncode, done.stdout, given) == (2, "", None)
    (line,) = done.stderr.splitlines()
    assert line.startswith("slurm.sbatch: error: ") and reason in line


SRUN = f"""#!{sys.executable}
import os, subprocess, sys

words = sys.argv[next(k for k, word in enumerate(sys.argv) if k and not word.startswith("--")):]
assert words[0] == "k3jax"
variables = {{
    "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_LOCALID": "0", "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count=2",
}}
variables = os.environ | variables
processes = [
    subprocess.Popen(
        [sys.executable, os.environ["STUB"], *words[1:]],
        env=variables | {{"SLURM_PROCID": number}},
    )
    for number in "01"
]
sys.exit(max(process.wait(100) for process in processes))
"""
# k3jax but for the training itself.
STUB = """
    import os, pathlib, sys
    import jax
    from jax.experimental import multihost_utils
    from k3jax.cli.main import main
    from k3jax.training import training_run

    def train_stages(runs, progress):
        (config,) = runs.values()
        counts = jax.process_count(), jax.device_count(), jax.local_device_count()
        multihost_utils.sync_global_devices("all are here")
        name = f"said by {jax.process_index()}"
        said = f"{counts} {config.mesh} {config.train.task}"
        (pathlib.Path(os.environ["TEST"]) / name).write_text(said)
        return "done"

    training_run.train_stages = train_stages
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_mesh_has_the_devices_of_all_nodes(submit):
    """The script's own command, as two processes of a job on loopback."""
    submit.write("srun", SRUN)
    (submit.folder / "stub.py").write_text(textwrap.dedent(STUB))
    done, _ = submit(
        *TRAIN,
        LAYOUT="mesh",
        SLURM_JOB_ID=str(_job_with_a_free_port()),
        STUB=str(submit.folder / "stub.py"),
    )
    assert done.returncode == 0, done.stderr
    said = [path.read_text() for path in sorted(submit.folder.glob("said by *"))]
    assert said == ["(2, 4, 2) fsdp=-1 text_to_image"] * 2


def _job_with_a_free_port() -> int:
    """JAX takes a job's number as its port, from 61440 on."""
    for job in range(1000, 2000):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", 61440 + job)):
                return job
    raise OSError("no free port")
