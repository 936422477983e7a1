# SPDX-License-Identifier: Apache-2.0
"""The plan of a run on a slice: its programs compiled, what does not fit refused, totals."""

from dataclasses import dataclass

from k3jax.planning.compiler import Compiled
from k3jax.planning.fitting import (
    Compile,
    DoesNotFit,
    Say,
    Trial,
    batch_sentence,
    largest_batch,
    weights_sentence,
)
from k3jax.planning.throughput import Evaluations, Totals, baseline, evaluations, total
from k3jax.planning.workload import DENOISER, Name, PlanOptions, Work, program_names, weight_bytes


@dataclass(frozen=True)
class Program:
    """One compiled program in a plan.

    Attributes:
        runs: how often it runs for a batch.
        other_weights: bytes of other components' weights on each chip meanwhile.
    """

    name: Name
    work: Work
    runs: int
    other_weights: int
    compiled: Compiled

    @property
    def memory(self) -> int:
        return self.compiled.memory.peak + self.other_weights


@dataclass(frozen=True)
class Plan:
    """Attributes:
    encoder_split: whether the text encoder needs another mesh.
    together: whether all weights fit a chip at once with any of the programs; None where that is
        unknown, because the encoder is left out or on another mesh.
    """

    options: PlanOptions
    programs: tuple[Program, ...]
    evaluations: Evaluations
    totals: Totals
    encoder_split: bool
    together: bool | None


def make_plan(options: PlanOptions, compile_program: Compile, say: Say) -> Plan:
    """Compiles the programs of a plan and adds up their figures.

    Args:
        compile_program: raises OutOfMemory; see `compiler.compile_in_child`.
        say: called with a sentence before each step that takes minutes.

    Raises:
        DoesNotFit: with the largest batch of those tried that does.
        ValueError: settings that cannot be.
    """
    if options.batch < 1:
        raise ValueError(f"--batch is {options.batch}; it must be 1 or more.")
    counts = evaluations(options.sampler, options.call.guidance_interval)
    names = program_names(options.parts, counts)
    trial = Trial(options, compile_program, say)
    for name in names:
        if fault := trial.arithmetic(name, 1):
            raise DoesNotFit(weights_sentence(options, name, fault), None)
    programs = []
    for position, name in enumerate(names):
        compiled, fault = trial(name, options.batch)
        if compiled is None:
            largest, tried = largest_batch(trial, names[position:], options.batch, say)
            raise DoesNotFit(batch_sentence(options, name, fault, largest, tried), largest)
        work = trial.work(name, options.batch)
        programs.append(Program(name, work, counts.runs[name], trial.other_weights(name), compiled))
    return _finish(options, tuple(programs), counts, trial)


def _finish(options: PlanOptions, programs, counts: Evaluations, trial: Trial) -> Plan:
    chip, where = options.where.chip, options.where
    sampler, name = baseline(options.model.sampler)
    totals = total(
        images=trial.work("denoise", options.batch).images,
        chips=where.count,
        peak=chip.peak,
        seconds={p.name: p.compiled.cost.seconds for p in programs},
        flops={p.name: p.compiled.cost.flops for p in programs},
        counts=counts,
        against=evaluations(sampler),
        baseline=name,
        price=options.price,
    )
    split = trial.encoder_sizes != trial.sizes
    together = None
    if "encode" in options.parts and not split:
        encoder = weight_bytes("text_encoder", trial.work("encode", options.batch))
        rest = sum(weight_bytes(part, trial.work("denoise", 1)) for part in DENOISER)
        needed = [p.memory + (rest if p.name == "encode" else encoder) for p in programs]
        together = max(needed) <= chip.usable
    return Plan(options, programs, counts, totals, split, together)
