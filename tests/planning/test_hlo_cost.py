# SPDX-License-Identifier: Apache-2.0
"""Reading optimised HLO and schedules of real TPU programs, and what they cost."""

import dataclasses
import itertools

import numpy as np
import pytest

from k3jax.planning.chips import CHIPS
from k3jax.planning.collectives import Collective
from k3jax.planning.cost import Cost, estimate
from k3jax.planning.flops import taps
from k3jax.planning.hlo import parse_arrays, parse_hlo
from k3jax.planning.schedules import kernel_cycles, read_schedules


V5E = CHIPS["v5e"]


def test_types():
    arrays = parse_arrays("(f32[2,3]{1,0:T(8,128)S(1)}, bf16[]{:T(256)}, token[], s4[5]{0})")
    assert [(a.dtype, a.shape, a.in_hbm) for a in arrays] == [
        ("f32", (2, 3), False),
        ("bf16", (), True),
        ("s4", (5,), True),
    ]
    assert [a.bytes for a in arrays] == [24, 2, 2.5]
    with pytest.raises(ValueError, match="no ENTRY"):
        parse_hlo("HloModule nothing")


def test_a_loop_counts_as_often_as_it_runs(stored):
    cost = estimate(stored("scan"), V5E)
    assert cost.flops == 6 * 2 * 256 * 512 * 512
    # Each run reads its layer of the stacked weights, not all of them; x comes and goes once.
    assert cost.hbm_bytes == pytest.approx(6 * 512 * 512 * 2 + 2 * 256 * 512 * 2, rel=1e-3)
    assert cost.unknown_loops == 0 and cost.collectives == () and cost.figure == "floor"
    assert cost.floor == cost.seconds >= cost.hbm_bytes / V5E.bandwidth


def test_taps_on_padding_are_no_flops(stored):
    # 64 -> 32 by stride 2 with one row of padding: 95 of 96 taps a side land on data. XLA computes
    # 80 columns of windows for each 32 of the result, with as much padding between.
    taps = 32 * 3 - 1
    needed = 2 * 2 * taps * taps * 128 * 256
    assert needed < estimate(stored("convolution"), V5E).flops < 1.3 * needed


def test_batched_products_as_dilated_convolutions():
    # 8 products (16, 32) @ (32, 64), as XLA:TPU writes them.
    text = """HloModule m

ENTRY %main (a: f32[8,16,32], b: f32[8,32,64]) -> f32[8,16,64] {
  %a = f32[8,16,32]{2,1,0} parameter(0)
  %b = f32[8,32,64]{2,1,0} parameter(1)
  ROOT %c = f32[8,16,64]{2,1,0} convolution(%a, %b), \
window={size=8 stride=7 pad=0_0 lhs_dilate=8}, dim_labels=0bf_0io->0bf
}
"""
    assert estimate(parse_hlo(text), V5E).flops == 8 * 2 * 16 * 32 * 64


@pytest.mark.parametrize(
    "settings", list(itertools.product((1, 2, 3), (0, 1, 4), (1, 2, 5), (1, 2)))
)
def test_taps(settings):
    stride, pad, lhs_dilate, rhs_dilate = settings
    size, outputs, window = 7, 11, 4
    expected = sum(
        at % lhs_dilate == 0 and 0 <= at // lhs_dilate < size
        for o in range(outputs)
        for k in range(window)
        for at in [o * stride + k * rhs_dilate - pad]
    )
    found = taps(
        size=size,
        outputs=outputs,
        window=window,
        stride=stride,
        pad=pad,
        lhs_dilate=lhs_dilate,
        rhs_dilate=rhs_dilate,
    )
    assert found == expected


def test_collectives(stored):
    cost = estimate(stored("collectives"), V5E)
    assert cost.collectives == (
        Collective("all-gather", 2, 2 * 512 * 256 * 2),
        Collective("all-reduce", 1, 256 * 256 * 2),
    )
    # Half of what is gathered comes from the neighbour; a sum passes twice.
    network = (256 * 512 * 2 + 256 * 256 * 2) / (2 * V5E.link)
    assert cost.stalls >= network
    assert cost.seconds >= network + cost.flops / V5E.peak
    assert cost.waiting >= network and set(cost.kinds) >= {"products"}
    assert Cost.from_json(cost.to_json()) == cost


def test_convolutions_fused_with_a_collective_count():
    """As XLA:TPU gathers weights while it computes: a start, a convolution and a part of the
    gathering in one fusion, an end. It is one collective."""
    gather = "bf16[256,128]{1,0} all-gather(%s), channel_id=7, replica_groups=[1,4]<=[4]"
    weights, product = "bf16[256,128]", "bf16[512,1024]"
    text = f"""HloModule m

%edge (s: bf16[64,128]) -> {weights} {{
  %s = bf16[64,128]{{1,0}} parameter(0)
  ROOT %ag = {gather}, dimensions={{0}}
}}

%async_collective_fusion.1 (p: bf16[512,256], q: bf16[256,1024], s: bf16[64,128]) -> \
({product}, {weights}) {{
  %p = bf16[512,256]{{1,0}} parameter(0)
  %q = bf16[256,1024]{{1,0}} parameter(1)
  %s = bf16[64,128]{{1,0}} parameter(2)
  %conv = {product}{{1,0}} convolution(%p, %q), dim_labels=bf_io->bf
  %ag = {gather}, dimensions={{0}}
  ROOT %t = ({product}{{1,0}}, {weights}{{1,0}}) tuple(%conv, %ag)
}}

ENTRY %main (x: bf16[512,256], w: bf16[256,1024], s: bf16[64,128]) -> {weights} {{
  %x = bf16[512,256]{{1,0}} parameter(0)
  %w = bf16[256,1024]{{1,0}} parameter(1)
  %s = bf16[64,128]{{1,0}} parameter(2)
  %async-collective-start = {weights}{{1,0}} fusion(%s), kind=kCustom, calls=%edge
  %f = ({product}{{1,0}}, {weights}{{1,0}}) fusion(%x, %w, %s), kind=kOutput, \
calls=%async_collective_fusion.1
  ROOT %async-collective-done = {weights}{{1,0}} fusion(%s), kind=kCustom, calls=%edge
}}
"""
    cost = estimate(parse_hlo(text), V5E)
    assert cost.flops == 2 * 512 * 256 * 1024
    assert cost.collectives == (Collective("all-gather", 1, 256 * 128 * 2),)
    network = 3 / 4 * 256 * 128 * 2 / (2 * V5E.link)
    kernel = cost.kinds["products"]
    assert cost.seconds == pytest.approx(max(network, kernel)) and set(cost.kinds) == {"products"}
    assert cost.stalls == pytest.approx(max(0, network - kernel), abs=1e-12)


def test_cycles_of_loops(schedules):
    lines = """
     0   :  { entry }
   0x1 LB: > { body }
   0x2 LB: > > { /* phi copy :: iteration index, stage = 1 iter bound = 0 */ }
   0x3   :  { }
   0x4   : > > { %p = scmp.ge.s32.totalorder %s1_s2, 5 /* loop exit test */ }
   0x5 LB: > > { %p = scmp.ge.s32.totalorder %s3_s4, 10 /* loop exit test */ }
   0x6   : > { %p = scmp.ge.s32.totalorder %s5_s6, 7 /* loop exit test */ }
   0x7   :  { end }
"""
    inside = 3 * (5 - 1) + 1 * 10
    assert kernel_cycles(lines.splitlines()) == 2 + 7 * (2 + inside)
    # A pipelined loop over five blocks, three lines before it and three behind (one is the loop's).
    cycles = read_schedules(schedules("softmax"))
    assert set(cycles) == {"fusion", "fusion.1"}
    assert 5 * 1860 < cycles["fusion"] < 5 * 1880


def test_schedules_count_where_they_are_longer(stored, schedules):
    module = stored("scan")
    floor = estimate(module, V5E)
    cycles = read_schedules(schedules("scan"))
    assert cycles == {"divide_multiply_fusion.2": 1001}
    cost = estimate(module, V5E, cycles)
    assert cost.figure == "schedule" and cost.floor == floor.seconds
    assert cost.seconds >= 6 * 1001 / V5E.clock > 0
    assert 0.5 < cost.scheduled <= 1
    # Cycles fewer than the arithmetic needs do not make it faster.
    fast = estimate(module, V5E, {"divide_multiply_fusion.2": 1})
    assert np.isclose(fast.seconds, floor.seconds)
    assert dataclasses.replace(fast, figure="floor").flops == floor.flops


def test_equal_kernels_share_a_schedule():
    body = "\n".join(
        f"""%f.{n} (p.{n}: f32[8,128]) -> f32[8,128] {{
  %p.{n} = f32[8,128]{{1,0}} parameter(0)
  ROOT %e.{n} = f32[8,128]{{1,0}} {op}(%p.{n})
}}
"""
        for n, op in ((1, "exponential"), (2, "exponential"), (3, "exponential"))
    )
    text = f"""HloModule m

{body}
ENTRY %main (x: f32[8,128]) -> f32[8,128] {{
  %x = f32[8,128]{{1,0}} parameter(0)
  %a = f32[8,128]{{1,0:S(1)}} fusion(%x), kind=kLoop, calls=%f.1
  %b = f32[8,128]{{1,0:S(1)}} fusion(%a), kind=kLoop, calls=%f.2
  ROOT %c = f32[8,128]{{1,0}} fusion(%b), kind=kLoop, calls=%f.3
}}
"""
    cost = estimate(parse_hlo(text), V5E, {"a": 1500})
    assert cost.scheduled == 1 and np.isclose(cost.seconds, 3 * 1500 / V5E.clock)


def test_a_schedule_far_above_the_estimate_is_not_believed():
    text = """HloModule m

%f (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0} parameter(0)
  ROOT %e = f32[8,128]{1,0} exponential(%p)
}

ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  ROOT %a = f32[8,128]{1,0} fusion(%x), kind=kLoop, calls=%f, \
backend_config={"window_config":{"estimated_cycles":"1000"}}
}
"""
    module = parse_hlo(text)
    believed = estimate(module, V5E, {"a": 4000})
    assert believed.scheduled == 1 and np.isclose(believed.seconds, 4000 / V5E.clock)
    misread = estimate(module, V5E, {"a": 4001})
    assert misread.scheduled == 0 and np.isclose(misread.seconds, 1000 / V5E.clock)


def test_time_by_kind():
    text = """HloModule m

%moves (p.1: bf16[512,512]) -> bf16[512,512] {
  %p.1 = bf16[512,512]{1,0} parameter(0)
  ROOT %t = bf16[512,512]{0,1} transpose(%p.1), dimensions={1,0}
}

%adds (p.2: bf16[512,512]) -> bf16[512,512] {
  %p.2 = bf16[512,512]{1,0} parameter(0)
  ROOT %a = bf16[512,512]{1,0} add(%p.2, %p.2)
}

%sums (p.3: bf16[512,512]) -> bf16[512] {
  %p.3 = bf16[512,512]{1,0} parameter(0)
  %z = bf16[] constant(0)
  ROOT %r = bf16[512]{0} reduce(%p.3, %z), dimensions={1}, to_apply=%adds
}

ENTRY %main (x: bf16[512,512]) -> bf16[512] {
  %x = bf16[512,512]{1,0} parameter(0)
  %moved = bf16[512,512]{1,0} fusion(%x), kind=kLoop, calls=%moves
  %product = bf16[512,512]{1,0} dot(%moved, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %twice = bf16[512,512]{1,0} fusion(%product), kind=kLoop, calls=%adds
  %attended = bf16[512,512]{1,0} custom-call(%twice), custom_call_target="tpu_custom_call"
  %copied = bf16[512,512]{1,0} copy(%attended)
  ROOT %summed = bf16[512]{0} fusion(%copied), kind=kLoop, calls=%sums
}
"""
    cycles = {
        name: 10**6 * n
        for n, name in enumerate(("moved", "product", "twice", "attended", "copied", "summed"), 1)
    }
    cost = estimate(parse_hlo(text), V5E, cycles)
    expected = {"copies": 6, "products": 2, "element-wise": 3, "attention": 4, "reductions": 6}
    for kind, millions in expected.items():
        assert np.isclose(cost.kinds[kind], millions * 1e6 / V5E.clock), kind
    assert set(cost.kinds) == set(expected) and np.isclose(cost.waiting, 0)
