# SPDX-License-Identifier: Apache-2.0
"""Measure the programs of a batch on the devices of this machine.

  k3jax benchmark --config kandinsky3 --batch 4
  k3jax benchmark --repeats 20 --programs denoise,decode

Prints a JSON line for the text encoder, for one denoising step (with guidance, and without if the
sampler has such steps), and for the decoder; then one for whole images, computed from these. No
weights are loaded. Without --config or --checkpoint it measures the small model that comes with
k3jax. `k3jax plan` estimates the same for a TPU.
"""

import argparse
import dataclasses
import json

from k3jax.cli.plan import add_work, parts, run_config, size_and_sampler


DEFAULT_CONFIG = "tiny"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_work(add)
    add("--repeats", type=int, default=5, metavar="N", help="runs; the median is printed (5)")


def run(args: argparse.Namespace) -> None:
    for name in ("batch", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be 1 or more.")
    config = run_config(args, DEFAULT_CONFIG)

    from k3jax.planning.measurement import measure_all, setting
    from k3jax.planning.throughput import evaluations
    from k3jax.planning.workload import Work, program_names
    from k3jax.sharding import make_mesh

    height, width, sampler = size_and_sampler(config)
    made = evaluations(sampler, config.generate.guidance_interval)
    names = program_names(parts(args), made)
    mesh = make_mesh(config.pipeline.mesh)
    dtype = config.pipeline.dtype
    work = Work(
        dataclasses.replace(config.model, sampler=sampler),
        dict(mesh.shape),
        args.batch,
        height,
        width,
        dtype,
        config.pipeline.param_dtype or dtype,
        config.pipeline.int8_text_encoder,
    )
    seconds = {}
    for line in measure_all(names, work, mesh, args.repeats):
        print(json.dumps(line), flush=True)
        seconds[line["case"]] = line["seconds"]
    batch = sum(made.runs[name] * each for name, each in seconds.items())
    whole = {
        "case": "total",
        "seconds": batch,
        "images": work.images,
        "images_per_second_per_device": work.images / batch / mesh.devices.size,
        "steps": made.steps,
        "unet_passes": made.passes,
        "of": names,
    }
    print(json.dumps({**whole, **setting(work, mesh)}), flush=True)
