# SPDX-License-Identifier: Apache-2.0
"""What fits, what is refused before anything is compiled, and which batch is named instead."""

import math

import pytest

from k3jax.model.abstract import abstract_module, parameter_count
from k3jax.planning.chips import CHIPS, parse_slice
from k3jax.planning.compiler import OutOfMemory
from k3jax.planning.fitting import DoesNotFit
from k3jax.planning.plan import make_plan
from k3jax.planning.workload import Work, input_bytes, weight_bytes
from k3jax.sharding import mesh_sizes

from made_programs import compiled, model_of


class Compiler:
    """Has room for so many images a chip in each program; notes what it was asked."""

    def __init__(self, **most):
        self.most, self.asked = most, []

    def __call__(self, name, work):
        self.asked.append((name, work.batch))
        if work.batch > self.most.get(name, math.inf):
            raise OutOfMemory("Ran out of memory in memory space hbm. Used 20G of 15.75G hbm")
        return compiled(arguments=7e9 if name.startswith("denoise") else 1e9)


def refusal(plan_options, compiler):
    said = []
    with pytest.raises(DoesNotFit) as caught:
        make_plan(plan_options, compiler, said.append)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
    return message, caught.value.largest, said


def test_bytes_on_a_chip():
    model = model_of("kandinsky3")

    def work(spec, chips=8):
        return Work(model, mesh_sizes(spec, chips), 2, 1024, 1024)

    count = parameter_count(abstract_module("unet", model))
    assert weight_bytes("unet", work("data=8")) == 2 * count
    split = weight_bytes("unet", work("data=2,fsdp=4"))
    assert count * 2 / 4 < split < count * 2 / 2
    assert work("data=2,fsdp=2,tensor=2").images == 2 * 4  # tensor: the same images
    latents = 2 * 128 * 128 * 4 * 4
    assert input_bytes("decode", work("data=8")) == latents
    # Of each of the two unconditional samples: the pooled context, the bias, and keys and values in
    # bfloat16 of three cross-attentions in each level that has them, down and up (where the first
    # has the channels of the skip as well).
    channels = 2 * 3 * (768 + 1536 + 3072) + 768 + 1536
    context = 2 * (1536 * 4 + 128 * 4 + 128 * channels * 2 * 2)
    guided, plain = (input_bytes(name, work("data=8")) for name in ("denoise", "denoise_plain"))
    assert guided - plain == context + 2 * 4  # and the guidance scale
    assert Work.from_json(work("data=8").to_json()) == work("data=8")


def test_what_fits_is_compiled_once(plan_options):
    compiler, said = Compiler(), []
    plan = make_plan(plan_options(), compiler, said.append)
    # 17.4 GB of encoder on chips of 16.9 GB: it is split over two, the others are not.
    assert compiler.asked == [("encode", 4), ("denoise", 4), ("decode", 4)]
    assert plan.programs[0].work.mesh == {"data": 4, "fsdp": 2, "tensor": 1}
    assert plan.programs[1].work.mesh == {"data": 8, "fsdp": 1, "tensor": 1}
    assert plan.encoder_split and plan.together is None
    assert plan.totals.images == 32 and plan.programs[1].runs == 50
    assert said[0] == "compiling the text encoder for v5e:2x4, batch 4"
    # The decoder runs with the U-Net's weights in memory.
    assert plan.programs[2].other_weights > 6e9


def test_weights_together(plan_options):
    plan = make_plan(plan_options("v6e:2x4"), Compiler(), lambda text: None)
    assert plan.together and not plan.encoder_split
    small = make_plan(plan_options("v5e:2x4", "tiny"), Compiler(), lambda text: None)
    assert small.together


def test_the_compiler_refuses(plan_options):
    message, largest, said = refusal(plan_options(batch=16), Compiler(denoise=5))
    assert largest == 4 and "the largest batch that fits is 4 images a chip" in message
    assert "(tried: 8, 4)" in message and "Used 20G of 15.75G hbm" in message
    assert message.startswith("--batch 16 does not fit v5e:2x4: for the denoising step")
    assert any("trying 8" in line for line in said)


def test_the_batch_named_fits_all_programs(plan_options):
    compiler = Compiler(denoise=5, decode=1)
    _, largest, _ = refusal(plan_options(batch=16), compiler)
    assert largest == 1
    assert refusal(plan_options(batch=16), Compiler(denoise=0))[1] is None
    message, largest, _ = refusal(plan_options(batch=1), Compiler(denoise=0))
    assert largest is None and "no smaller batch fits" in message


def test_arithmetic_refuses_without_compiling(plan_options):
    compiler = Compiler()
    message, largest, _ = refusal(plan_options("v5e:1x1"), compiler)
    assert largest is None and compiler.asked == []
    assert "no batch fits v5e:1x1" in message and "17.4 GB of the 16.9 GB" in message
    assert "--programs denoise,decode" in message
    # Without the encoder it is another matter.
    make_plan(plan_options("v5e:1x1", parts=("denoise", "decode")), compiler, lambda text: None)

    compiler = Compiler()
    huge = plan_options(batch=8192, parts=("denoise",))
    message, largest, _ = refusal(huge, compiler)
    assert "weights and inputs alone take" in message
    assert largest == compiler.asked[0][1] < 8192


def test_other_weights_count(plan_options):
    def full(name, work):
        return compiled(arguments=7e9, temporaries=9.5e9 if work.batch > 1 else 9.2e9)

    message, largest, _ = refusal(plan_options(batch=2, parts=("denoise",)), full)
    assert "with the other weights in memory" in message and largest == 1


def test_settings_that_cannot_be(plan_options):
    for changes, words in (
        ({"batch": 0}, "--batch is 0"),
        ({"parts": ("encoder",)}, "choose of encode, denoise, decode"),
        ({"mesh": "data=3"}, "choose sizes whose product is 8"),
        ({"encoder_mesh": "data=3"}, "choose sizes whose product is 8"),
    ):
        with pytest.raises(ValueError, match=words):
            make_plan(plan_options(**changes), Compiler(), lambda text: None)


def test_slices():
    assert parse_slice("V5E:2x4").name == "v5e:2x4" and parse_slice("v5p:2x2x2").count == 8
    for text, words in (
        ("v9:2x2", "known are v4, v5e, v5p, v6e"),
        ("v5e", "has 2 sides"),
        ("v5p:2x2", "has 3 sides.*v5p:2x2x1"),
        ("v5e:0x4", "1 or more"),
        ("v5e:3x4", "do not make up a side of 3"),
        ("v5e:axb", "has 2 sides"),
    ):
        with pytest.raises(ValueError, match=words):
            parse_slice(text)
    assert all(chip.usable <= 1.01 * chip.hbm for chip in CHIPS.values())
