# SPDX-License-Identifier: Apache-2.0
"""Programs compiled by the real TPU compiler for slices that are not there.

pip install 'k3jax[tpu]' (Linux, no TPU needed); .ci/run does so. All are of the small model but for
the gates, which are of K3JAX_GATE_MODEL: "kandinsky3" by default, three minutes and more for each.
"""

import functools
import json
import os

import pytest

from k3jax.cli.main import main
from k3jax.planning.chips import CHIPS, parse_slice
from k3jax.planning.compiler import OutOfMemory, compile_in_child
from k3jax.planning.fitting import DoesNotFit
from k3jax.planning.plan import make_plan
from k3jax.planning.workload import Work, weight_bytes
from k3jax.sharding import mesh_sizes

from made_programs import model_of


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tpu_compiler")]


GATE_MODEL = os.environ.get("K3JAX_GATE_MODEL", "kandinsky3")


@functools.cache  # with the small model, a gate's program is looked at twice
def compile_for(program, topology, mesh, batch=1, size=64, model="tiny"):
    where = parse_slice(topology)
    work = Work(model_of(model), mesh_sizes(mesh, where.count), batch, size, size)
    return work, compile_in_child(program, work, where)


@pytest.mark.parametrize(
    "topology, batch", [("v5e:2x2", 8), ("v5e:2x4", 4), ("v6e:2x2", 16), ("v5e:16x16", 4)]
)
def test_gates_of_the_denoising_step(topology, batch, capsys):
    """Data parallel on any slice: it fits, and says nothing to other chips."""
    full = GATE_MODEL != "tiny"
    size = 1024 if full else 64
    work, compiled = compile_for("denoise", topology, "data=-1", batch, size, GATE_MODEL)
    where, cost, memory = parse_slice(topology), compiled.cost, compiled.memory
    assert work.images == batch * where.count
    assert cost.collectives == ()
    used = memory.arguments + memory.outputs + memory.temporaries + memory.code
    used += weight_bytes("movq", work)
    share = cost.flops / where.chip.peak / cost.seconds
    with capsys.disabled():
        print(
            f"\n{topology}, {batch} a chip: {cost.seconds * 1e3:.1f} ms, {100 * share:.1f} % of "
            f"peak, {memory.temporaries / 1e6:.0f} MB of temporaries, compiled in "
            f"{compiled.seconds:.0f} s"
        )
    assert used < where.chip.usable
    if full:
        assert memory.temporaries < 0.25e9 * batch
    if full and topology == "v5e:2x4":
        assert share > 0.85


def test_what_is_said_of_a_program():
    work, compiled = compile_for("denoise", "v5e:2x4", "data=-1", 4, 64, "tiny")
    assert compiled.cost.figure == "schedule" and compiled.cost.scheduled > 0.9
    assert compiled.cost.seconds > compiled.cost.floor > 0
    assert compiled.cost.unknown_loops == 0 and compiled.cost.flops > 1e8
    # Arrays lie in tiles, so they take more than their elements.
    assert weight_bytes("unet", work) <= compiled.memory.arguments < 3 * weight_bytes("unet", work)


def test_collectives_of_a_split_encoder():
    _, split = compile_for("encode", "v5e:2x2", "fsdp=2,tensor=2")
    kinds = {collective.kind for collective in split.cost.collectives}
    assert {"all-gather", "all-reduce"} <= kinds
    _, copied = compile_for("encode", "v5e:2x2", "data=4")
    assert copied.cost.collectives == ()
    assert split.memory.arguments < copied.memory.arguments
    # Four layers in a loop: each counts.
    layers = 4 * (4 * 96 * 96 + 3 * 96 * 192)
    assert 2 * 128 * layers < copied.cost.flops < 2.2 * 2 * 128 * layers


def test_usable_memory_is_what_the_compiler_says():
    for chip in CHIPS.values():
        topology = f"{chip.name}:" + "x".join(["2", "2", "1"][: chip.dimensions])
        with pytest.raises(OutOfMemory) as caught:
            compile_for("encode", topology, "data=-1", batch=2**24)
        assert f"{chip.usable / 2**30:.2f}G" in str(caught.value)


def test_a_batch_that_only_the_compiler_refuses(plan_options):
    where = parse_slice("v5e:1x1")
    said = []
    with pytest.raises(DoesNotFit) as caught:
        make_plan(
            plan_options("v5e:1x1", "tiny", batch=2**16, height=64, width=64, parts=("encode",)),
            lambda program, work: compile_in_child(program, work, where),
            said.append,
        )
    assert "the compiler says" in str(caught.value) and "15.75G" in str(caught.value)
    assert 1 <= caught.value.largest < 2**16
    assert f"largest batch that fits is {caught.value.largest}" in str(caught.value)


def test_the_command(capsys):
    arguments = "--config tiny --topology v5e:2x2 --height 64 --width 64 --json".split()
    assert main(["plan", *arguments, "--price-per-chip-hour", "1.2"]) == 0
    out, err = capsys.readouterr()
    values = json.loads(out)
    assert [program["name"] for program in values["programs"]] == ["encode", "denoise", "decode"]
    for program in values["programs"]:
        assert program["figure"] == "schedule" and program["collectives"] == []
        assert 0 < program["memory"]["share_of_hbm"] < 0.1 and program["seconds"] > 0
    assert values["totals"]["images"] == 4 and values["totals"]["dollars_per_1000"] > 0
    assert "compiling the decoder for v5e:2x2" in err
