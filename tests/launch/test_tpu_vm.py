# SPDX-License-Identifier: Apache-2.0
"""launch/tpu_vm.sh: the commands that it prints, and that they work with folders as hosts.

The gcloud of these tests records its arguments, and runs the command for a host in a folder.
"""

import os
import shlex
import shutil
import subprocess
import time

import pytest

from manifests import ROOT


SCRIPT = ROOT / "launch" / "tpu_vm.sh"
PLACE = ["--zone", "us-west4-a", "--project", "ours"]
WORK = ["--", "gs://b/prompts.txt", "gs://b/out", "--negative-prompt", "it's  bad"]

# create: requested, then provisioning, then active. ssh: on one host after the other.
GCLOUD = """#!/bin/bash
echo "gcloud $*" >> "$TEST/calls"
case "$*" in
    *" create "*) echo PROVISIONING > "$TEST/state" ;;
    *" describe "*)
        cat "$TEST/state" 2>/dev/null || exit 1
        ! grep -q PROVISIONING "$TEST/state" || echo ACTIVE > "$TEST/state" ;;
    *" delete "*) rm -f "$TEST/state" ;;
    *" scp "*) for host in 0 1; do cp "$5" "$TEST/host$host/${6#*:}" || exit; done ;;
    *" ssh "*)
        [ -e "$TEST/state" ] || exit 1
        [ ! -e "$TEST/break" ] || { rm "$TEST/break"; echo SUSPENDED > "$TEST/state"; exit 1; }
        for word; do case $word in --command=*) script=${word#--command=} ;; esac; done
        for host in 0 1; do
            HOST=$host HOME=$TEST/host$host bash -c "$script" || exit
        done ;;
esac
"""
CURL = """#!/bin/bash
case "${!#}" in
    */agent-worker-number) echo "$HOST" ;;
    */worker-network-endpoints) echo "10.0.0.2,10.0.0.3" ;;
    *) exit 22 ;;
esac
"""
# Packs one small file instead of the whole checkout.
TAR = f"""#!/bin/bash
[ "$1" != -czf ] || set -- "$1" "$2" -C "$4" pyproject.toml
exec {shutil.which("tar")} "$@"
"""
# The work: waits for a file, writes its arguments, and ends with the code in a file.
K3JAX = """#!/bin/bash
[ "$1" = --version ] && exit
until [ -e "$TEST/go" ]; do sleep 0.02; done
printf '%s\\n' "$TPU_PROCESS_BOUNDS" "$JAX_COMPILATION_CACHE_DIR" "$@" > "$HOME/given"
exit "$(cat "$TEST/code" 2>/dev/null || echo 0)"
"""


@pytest.fixture
def launch(tmp_path):
    """(arguments) -> the finished process; `launch.calls()` are the commands that gcloud was given.

    Python and uv of the hosts do nothing: test_container.py installs for real.
    """
    stubs = {"bin/gcloud": GCLOUD, "bin/curl": CURL, "bin/tar": TAR, "bin/python3": "#!/bin/bash\n"}
    for host in ("host0", "host1"):
        stubs[f"{host}/.local/bin/uv"] = "#!/bin/bash\n"
        stubs[f"{host}/k3jax-env/bin/k3jax"] = K3JAX
    for name, text in stubs.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    class Launch:
        folder = tmp_path

        def __call__(self, *words, path=None):
            environment = os.environ | {
                "PATH": path or f"{tmp_path / 'bin'}:{os.environ['PATH']}",
                "TEST": str(tmp_path),
                "TMPDIR": str(tmp_path),
                "K3JAX_TPU_VM_PAUSE": "0.05",
            }
            return subprocess.run(
                [SCRIPT, *words], env=environment, capture_output=True, text=True, timeout=30
            )

        def calls(self):
            path = tmp_path / "calls"
            return path.read_text() if path.exists() else ""

        def given(self, host):
            path = tmp_path / f"host{host}" / "given"
            return path.read_text().splitlines() if path.exists() else None

    made = Launch()
    yield made
    (tmp_path / "go").touch()  # nobody goes on waiting


@pytest.mark.parametrize(
    "command, expected",
    [
        ("create", ["queued-resources create", "queued-resources describe"]),
        ("install", ["tar -czf", "tpu-vm scp", "tpu-vm ssh"]),
        ("run", ["tpu-vm ssh"]),
        ("logs", ["tpu-vm ssh"]),
        ("delete", ["queued-resources delete"]),
        (
            "all",
            [
                *("queued-resources create", "queued-resources describe", "tar -czf"),
                *("tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh", "tpu-vm ssh"),
                "queued-resources delete",
            ],
        ),
    ],
)
def test_dry_run_prints_the_commands_and_runs_none(launch, command, expected):
    done = launch(command, *PLACE, "--dry-run", *(WORK if command in ("run", "all") else []))
    assert (done.returncode, done.stderr) == (0, "")
    assert launch.calls() == ""
    commands = _commands(done.stdout)
    found = [" ".join(words[:2] if words[0] == "tar" else words[3:5]) for words in commands]
    assert found == expected
    for words in commands:
        if words[0] == "tar":
            packed = words[words.index("--exclude=__pycache__") + 1 :]
            assert "k3jax" in packed and all((ROOT / name).exists() for name in packed)
            assert not os.path.exists(words[2])  # the archive
        assert words[0] == "tar" or {"--zone=us-west4-a", "--project=ours"} <= set(words)


def test_dry_run_needs_no_gcloud(launch):
    done = launch("delete", *PLACE, "--dry-run", path=_without_gcloud(launch))
    assert done.returncode == 0
    done = launch("delete", *PLACE, path=_without_gcloud(launch))
    assert done.returncode == 2
    assert "gcloud is not in PATH" in done.stderr


def test_what_is_asked_for(launch):
    options = ["--name", "pod", "--type", "v6e-16", "--service-account", "a@b.c", "--dry-run"]
    (create, *_) = _commands(launch("create", *PLACE, *options).stdout)
    assert set(create[5:]) == {
        *("pod", "--node-id=pod", "--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e"),
        *("--spot", "--service-account=a@b.c", "--project=ours", "--zone=us-west4-a"),
    }
    (create, *_) = _commands(launch("create", *PLACE, "--on-demand", "--dry-run").stdout)
    assert "--spot" not in create


@pytest.mark.parametrize(
    "words, reason",
    [
        ([], "create, install, run, logs, delete or all"),
        (["start"], "'start'"),
        (["create"], "--zone us-west4-a"),
        (["create", "--zone", "west"], "--zone 'west'"),
        (["create", "--zone"], "--zone needs a value"),
        (["create", "--zone", "--spot"], "--zone needs a value"),
        (["create", *PLACE, "--spot"], "'--spot'"),
        (["create", *PLACE, "--type", "h100"], "--type 'h100'"),
        (["create", *PLACE, "--name", "My Pod"], "--name 'My Pod'"),
        (["create", *PLACE, "--", "x"], "create takes no arguments after --"),
        (["logs", *PLACE, "--worker", "all"], "--worker 'all'"),
        (["run", *PLACE], "PROMPTS and OUT after --"),
        (["run", *PLACE, "--cache", "xla", *WORK], "--cache 'xla'"),
        (["run", *PLACE, "--", "a.txt", "out"], "PROMPTS and OUT must be gs://"),
        (["all", *PLACE, *WORK, "--hosts=3"], "--hosts=3"),
    ],
)
def test_bad_input_is_answered_in_one_sentence(launch, words, reason):
    done = launch(*words)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("tpu_vm.sh: error: ") and reason in line
    assert launch.calls() == ""


def test_work_outlives_the_connection_and_is_started_once(launch):
    (launch.folder / "state").write_text("ACTIVE\n")
    cache = ["--cache", "gs://b/xla"]
    done = launch("run", *PLACE, *cache, *WORK)
    assert "host 0 of 2 has started\nhost 1 of 2 has started\n" == done.stdout, done.stderr
    again = launch("run", *PLACE, *WORK)
    assert again.stdout.count("is running already") == 2
    assert "running already" in launch("install", *PLACE).stdout
    (launch.folder / "go").touch()
    assert "wait" not in launch("logs", *PLACE).stderr  # ends with the work
    for host in (0, 1):
        expected = ["1,1,1", "gs://b/xla", "synthesize", *WORK[1:]]
        assert launch.given(host) == [*expected, "--host", str(host), "--hosts", "2"]
        assert (launch.folder / f"host{host}" / "k3jax.exit").read_text() == "0\n"
    # Finished: the same command starts it again; `synthesize` skips finished shards.
    assert launch("run", *PLACE, *WORK).stdout.count("has started") == 2


def test_all_from_the_request_to_the_end(launch):
    """The machines are preempted once: they are requested again, and the work continues."""
    (launch.folder / "go").touch()
    (launch.folder / "break").touch()
    done = launch("all", *PLACE, *WORK)
    assert done.returncode == 0, done.stderr
    words = launch.calls().split()
    assert [words.count(name) for name in ("create", "delete")] == [2, 2]
    assert done.stdout.count("ended with 0") == 2
    assert not (launch.folder / "state").exists()


def test_refused_input_ends_all(launch):
    (launch.folder / "go").touch()
    (launch.folder / "code").write_text("2")
    done = launch("all", *PLACE, *WORK)
    assert done.returncode == 2
    assert "k3jax refused its input" in done.stderr
    assert not (launch.folder / "state").exists()


def test_machines_that_cannot_be_set_up_are_given_back(launch):
    (launch.folder / "host1" / ".local" / "bin" / "uv").write_text("#!/bin/bash\nexit 1\n")
    done = launch("all", *PLACE, *WORK)
    assert done.returncode == 2
    assert "could not be set up" in done.stderr
    assert not (launch.folder / "state").exists()


def test_a_killed_process_is_started_again(launch):
    (launch.folder / "state").write_text("ACTIVE\n")
    (launch.folder / "code").write_text("137")
    sleep = launch.folder / "bin" / "sleep"
    sleep.write_text('#!/bin/bash\n[ "$1" = 10 ] && echo 0 > "$TEST/code"\nexec /bin/sleep 0.01\n')
    sleep.chmod(0o755)
    (launch.folder / "go").touch()
    launch("run", *PLACE, *WORK)
    ends = [launch.folder / f"host{host}" / "k3jax.exit" for host in (0, 1)]
    deadline = time.monotonic() + 30
    while not all(end.exists() for end in ends) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [end.read_text() for end in ends] == ["0\n", "0\n"]
    assert "ended with 137; restarting" in (launch.folder / "host0" / "k3jax.log").read_text()


def _commands(printed):
    """The words of each command, by a shell's rules."""
    lexer = shlex.shlex(printed, posix=True, punctuation_chars=False)
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " ", True, ""
    commands = [[]]
    for token in lexer:
        last, newline, first = token.rpartition("\n") if "--command=" not in token else ("", "", "")
        if not newline:
            commands[-1].append(token)
            continue
        commands[-1].append(last)
        commands.append([first] if first else [])
    return [words for words in commands if words]


def _without_gcloud(launch):
    """A PATH with what the script itself needs."""
    folder = launch.folder / "few"
    folder.mkdir(exist_ok=True)
    for name in ("bash", "cat", "dirname", "env"):
        link = folder / name
        if not link.exists():
            link.symlink_to(f"/usr/bin/{name}")
    return str(folder)
