#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail

usage() {
    cat <<'END'
A data set on TPU VMs: create machines, install k3jax, synthesize on every host, delete the machines.

  launch/tpu_vm.sh COMMAND [OPTIONS] [-- PROMPTS OUT OPTIONS-OF-SYNTHESIZE]

  create     request the machines and wait until they are active
  install    install k3jax from this checkout on every host
  run        start or continue `k3jax synthesize` on every host; it needs no connection
  logs       follow the log of a host (--worker) until it ends
  delete     delete the machines
  all        create, install, run, wait for the end, delete; repeats after a preemption

  --name NAME                name of the queued resource and its TPU (k3jax)
  --zone ZONE                such as us-west4-a
  --project PROJECT          (the default of gcloud)
  --type TYPE                such as v5litepod-4, v5litepod-16, v6e-8 (v5litepod-16)
  --runtime VERSION          (depends on the type)
  --service-account EMAIL    account that can read and write the buckets (the project's default)
  --on-demand                no Spot machines
  --cache DIR                compiled programs, such as gs://bucket/xla (a folder on each host)
  --worker N                 number of the host for `logs` (0)
  --dry-run                  print the commands and run none

  launch/tpu_vm.sh all --zone us-west4-a --cache gs://b/xla -- \
      gs://b/prompts.parquet gs://b/pictures --checkpoint gs://b/kandinsky3 --mesh fsdp=-1
END
}

UV=0.13.9
PAUSE=${K3JAX_TPU_VM_PAUSE:-30}  # seconds between two polls
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

die() {
    echo "tpu_vm.sh: error: $1" >&2
    exit 2
}

note() { echo "tpu_vm.sh: $1" >&2; }

# Runs a command, or prints it quoted for a shell.
act() {
    local word line=""
    if [ ! "$dry_run" ]; then
        "$@"
        return
    fi
    for word in "$@"; do
        [[ $word =~ ^[-_a-zA-Z0-9@%+=:,./]+$ ]] || word="'${word//\'/\'\\\'\'}'"
        line+="$word "
    done
    printf '%s\n' "${line% }"
}

# tpus WORDS...: gcloud for this zone. Without standard input, because ssh would read this script's.
tpus() { act gcloud compute tpus "$@" "${place[@]}" </dev/null; }

# on_hosts WORKER SCRIPT: runs a script on the host with that number, or on all.
on_hosts() { tpus tpu-vm ssh "$name" --worker="$1" --command="$2"; }

state() {
    gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
        --format="value(state.state)" 2>/dev/null </dev/null || true
}

create() {
    local now asked=""
    if [ "$dry_run" ]; then
        ask
        tpus queued-resources describe "$name" --format="value(state.state)"
        return
    fi
    until now=$(state) && [ "$now" = ACTIVE ]; do
        case $now-$asked in
            -) ask && asked=yes || return ;;
            FAILED-*) die "the request $name failed: look up the reason in gcloud, and delete it." ;;
            # A preemption leaves an empty request.
            SUSPENDED-*) delete && asked="" || return ;;
            *) note "the request $name is ${now:-not visible yet}" ;;
        esac
        sleep "$PAUSE"
    done
}

ask() {
    tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
        --runtime-version="$runtime" "${request[@]}"
}

delete() {
    # --force deletes the TPU with its request.
    tpus queued-resources delete "$name" --quiet --force
}

# The Python of the machines is too old for k3jax; uv installs another.
INSTALL=$(cat <<END
set -eu
cd ~
if ! flock --nonblock k3jax.lock true; then
    echo "k3jax is running already; it is not installed again"
    exit 0
fi
rm -rf k3jax-source
mkdir k3jax-source
tar -xzf k3jax-source.tar.gz -C k3jax-source
python3 -m pip install --quiet --user uv==$UV
uv=~/.local/bin/uv
[ -e k3jax-env ] || \$uv venv --quiet --python 3.11 k3jax-env
\$uv pip install --quiet --python k3jax-env --reinstall-package k3jax \\
    --constraints k3jax-source/launch/gke/constraints.txt "\$HOME/k3jax-source[synth,gcs,tpu]"
k3jax-env/bin/k3jax --version
END
)

install() {
    local archive=${TMPDIR:-/tmp}/k3jax-source.tar.gz
    act tar -czf "$archive" -C "$ROOT" --exclude=__pycache__ \
        LICENSE README.md pyproject.toml k3jax configs convert launch/gke/constraints.txt || return
    tpus tpu-vm scp "$archive" "$name:k3jax-source.tar.gz" --worker=all || return
    on_hosts all "$INSTALL"
}

# The number of this host and of all hosts, from the metadata server of the TPU VM.
WHO=$(cat <<'END'
set -euo pipefail
cd ~
attribute() {
    curl --silent --fail --header 'Metadata-Flavor: Google' \
        "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}
host=$(attribute agent-worker-number)
hosts=$(attribute worker-network-endpoints | tr ',' '\n' | grep -c .)
END
)

# The work runs in its own session, which outlives the connection, and holds a lock, so that it starts
# only once. A killed process is started again and continues. Exit code 2 of k3jax means wrong input,
# where a retry cannot help.
RUN=$(cat <<'END'
exec 9> k3jax.lock
if ! flock --nonblock 9; then
    echo "host $host of $hosts is running already"
    exit 0
fi
if [ "$hosts" -gt 1 ]; then
    # libtpu sees only the chips of this host; otherwise it would wait for the whole slice.
    export TPU_WORKER_ID=0 TPU_WORKER_HOSTNAMES=localhost TPU_HOST_BOUNDS=1,1,1 \
        TPU_CHIPS_PER_HOST_BOUNDS=2,2,1 TPU_PROCESS_BOUNDS=1,1,1 \
        TPU_CHIPS_PER_PROCESS_BOUNDS=2,2,1 TPU_VISIBLE_DEVICES=0,1,2,3
fi
rm -f k3jax.exit
setsid nohup bash -c '
    while :; do
        code=0
        k3jax-env/bin/k3jax synthesize "$@" || code=$?
        case $code in 0 | 2 | 130 | 143) break ;; esac
        echo "tpu_vm.sh: ended with $code; restarting in 10 seconds"
        sleep 10
    done
    echo $code > k3jax.exit
' k3jax "${words[@]}" --host "$host" --hosts "$hosts" >> k3jax.log 2>&1 < /dev/null &
echo "host $host of $hosts has started"
END
)

LOGS=$(cat <<'END'
cd ~
tail -n 50 -F k3jax.log &
flock k3jax.lock true
sleep 1
kill $!
END
)

WAIT=$(cat <<'END'
flock k3jax.lock true
code=$(cat k3jax.exit || echo nothing)
[ "$code" = 0 ] || tail -n 5 k3jax.log || true
echo "host $host of $hosts ended with $code"
END
)

run() {
    local given="words=(${words[*]@Q})"
    [ ! "$cache" ] || given+=$'\n'"export JAX_COMPILATION_CACHE_DIR=${cache@Q}"
    on_hosts all "$WHO"$'\n'"$given"$'\n'"$RUN"
}

# Waits until all hosts have ended; succeeds if all shares are finished.
finished() {
    local report hosts finished
    if [ "$dry_run" ]; then
        on_hosts all "$WHO"$'\n'"$WAIT"
        return
    fi
    report=$(on_hosts all "$WHO"$'\n'"$WAIT") || true  # it fails after a preemption
    printf '%s\n' "$report"
    hosts=$(sed -n 's/^host [0-9]* of \([0-9]*\) ended with .*/\1/p' <<<"$report" | head -n 1)
    finished=$(grep -c '^host .* ended with 0$' <<<"$report") || true
    if grep -q '^host .* ended with 2$' <<<"$report"; then
        delete
        die "k3jax refused its input: see the last lines of its log above."
    fi
    [ "$hosts" ] && [ "$finished" = "$hosts" ]
}

all() {
    local tries=5
    while create; do
        if install && run; then
            tries=5
            finished && delete && return
        elif [ "$(state)" = ACTIVE ] && [ $((--tries)) = 0 ]; then
            delete
            die "the machines could not be set up: see the messages above."
        fi
        note "the work is not finished; continuing in $PAUSE seconds"
        sleep "$PAUSE"
    done
    die "gcloud refused the request for the machines: see its message above."
}

[ $# -gt 0 ] || die "give a command: create, install, run, logs, delete or all (see --help)."
command=$1 && shift
case $command in
    create | install | run | logs | delete | all) ;;
    -h | --help | help) usage && exit ;;
    *) die "there is no command '$command': it is create, install, run, logs, delete or all." ;;
esac

name=k3jax zone="" type=v5litepod-16 runtime="" cache="" worker=0 dry_run=""
place=() spot=(--spot) request=() words=()
while [ $# -gt 0 ]; do
    option=$1 && shift
    case $option in
        --dry-run) dry_run=yes && continue ;;
        --on-demand) spot=() && continue ;;
        --) words=("$@") && break ;;
        -h | --help) usage && exit ;;
        --name | --zone | --project | --type | --runtime | --service-account | --cache | --worker) ;;
        *) die "there is no option '$option'; those of synthesize come after -- (see --help)." ;;
    esac
    [ $# -gt 0 ] && [[ $1 != --* ]] || die "$option needs a value."
    case $option in
        --name) name=$1 ;;
        --zone) zone=$1 ;;
        --project) place+=("--project=$1") ;;
        --type) type=$1 ;;
        --runtime) runtime=$1 ;;
        --service-account) request+=("--service-account=$1") ;;
        --cache) cache=$1 ;;
        --worker) worker=$1 ;;
    esac
    shift
done

[[ $name =~ ^[a-z]([-a-z0-9]{0,60}[a-z0-9])?$ ]] ||
    die "--name '$name' is not valid: use lower-case letters, digits and hyphens, and start with a letter."
[ "$zone" ] || die "give a zone, such as --zone us-west4-a."
[[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || die "--zone '$zone' is not a zone such as us-west4-a."
[[ $worker =~ ^[0-9]+$ ]] || die "--worker '$worker' is not the number of a host."
[[ $cache =~ ^(gs://.+|/.*|)$ ]] || die "--cache '$cache' is neither a gs:// address nor a full path."
place+=("--zone=$zone")
request+=("${spot[@]}")

case $type in
    v5litepod-*) : "${runtime:=v2-alpha-tpuv5-lite}" ;;
    v5p-*) : "${runtime:=v2-alpha-tpuv5}" ;;
    v6e-*) : "${runtime:=v2-alpha-tpuv6e}" ;;
    v4-*) : "${runtime:=tpu-ubuntu2204-base}" ;;
    *) [ "$runtime" ] || die "--type '$type' is unknown to this script: give its --runtime, too." ;;
esac

case $command in
    run | all)
        [ "${#words[@]}" -ge 2 ] || die "give PROMPTS and OUT after --: -- PROMPTS OUT [OPTIONS]."
        [[ " ${words[*]} " == *" gs://"* ]] ||
            die "the hosts share no disk: PROMPTS and OUT must be gs:// addresses."
        for word in "${words[@]}"; do
            case $word in
                --host | --hosts | --host=* | --hosts=*)
                    die "$word is set by this script for each host: leave it out." ;;
            esac
        done
        ;;
    *) [ "${#words[@]}" -eq 0 ] || die "$command takes no arguments after --." ;;
esac
[ "$dry_run" ] || command -v gcloud >/dev/null ||
    die "gcloud is not in PATH: install the Google Cloud CLI, or print the commands with --dry-run."

case $command in
    logs) on_hosts "$worker" "$LOGS" ;;
    *) "$command" ;;
esac
