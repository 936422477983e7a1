# SPDX-License-Identifier: Apache-2.0
"""Training steps compiled by the real TPU compiler for slices that are not there.

    K3JAX_GATE_MODEL=kandinsky3 pytest -n 0 -s -m slow tests/training/test_tpu_step.py

Of K3JAX_GATE_MODEL, "kandinsky3" by default; each takes half an hour and 15 to 17 GB of memory.
"""

import json
import os
import subprocess
import sys

import pytest

from k3jax.planning.chips import parse_slice
from k3jax.planning.compiler import ENVIRONMENT


GATE_MODEL = os.environ.get("K3JAX_GATE_MODEL", "kandinsky3")
SMALL = GATE_MODEL == "tiny"
SIZE = 64 if SMALL else 1024
OVERRIDES = [("model.unet.block_out_channels", "32,64")] if SMALL else []  # less to compile
# Otherwise the compiler takes more than 23 GB of memory for the step of fine-tuning, and half as
# long again. The program is then another one: of a small model with three times the temporaries.
LEAST = {"exec_time_optimization_effort": -1.0, "memory_fitting_effort": -1.0}

# libtpu takes gigabytes, and the devices of this process are others.
COMPILE = """
import dataclasses, json, sys, time

from k3jax.planning.chips import parse_slice
from k3jax.cli.run_config import build, collect
from k3jax.sharding import make_mesh
from k3jax.training.step_memory import lower_step, step_memory

name, model, overrides, topology, mesh, batch, size, options = sys.argv[1:]
config = dataclasses.replace(build(collect(name)).train, batch_size=int(batch))
model = build(collect(model, json.loads(overrides))).model
devices = parse_slice(topology).devices()
start = time.monotonic()
lowered = lower_step(config, model, make_mesh(mesh, devices), size=int(size))
memory = step_memory(lowered.compile(json.loads(options)))
print(json.dumps({**dataclasses.asdict(memory), "seconds": time.monotonic() - start}))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("tpu_compiler")
@pytest.mark.parametrize(
    "config, topology, mesh, batch, options",
    [
        ("lora", "v5e:2x4", "data=-1", 8, None),
        ("finetune", "v5p:2x4x4", "fsdp=-1", 32, LEAST),
    ],
)
def test_it_fits(config, topology, mesh, batch, options, capsys):
    """One image a chip, in bfloat16; what is trained, and its moments, in float32."""
    overrides, options = json.dumps(OVERRIDES), json.dumps(options)
    words = [config, GATE_MODEL, overrides, topology, mesh, str(batch), str(SIZE), options]
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, *words],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    memory = json.loads(run.stdout.splitlines()[-1])
    total = memory["state"] + memory["temporaries"]
    with capsys.disabled():
        print(
            f"\n{config}, {topology}, batch {batch}: {memory['state'] / 1e9:.2f} GB of state and "
            f"{memory['temporaries'] / 1e9:.2f} GB of temporaries a chip, compiled in "
            f"{memory['seconds']:.0f} s"
        )
    assert 0 < total < parse_slice(topology).chip.usable
