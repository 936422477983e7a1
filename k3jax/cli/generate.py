# SPDX-License-Identifier: Apache-2.0
"""Make images of prompts.

Writes one PNG per image, with all that is needed to make it again in its text chunks, and a contact
sheet when there are several. The paths are printed as the images come. Image k of a run has the
seed SEED + k, and is the same whatever it is made together with.

  k3jax generate "a red circle" "a blue square" --checkpoint weights/kandinsky3 --num-images 4
  k3jax generate --prompts-file prompts.txt --config flash --output pictures

Without --checkpoint (and without a config that names one) the small model that comes with k3jax is
used. It draws scenes of coloured shapes and knows nothing else.
"""

import argparse
import sys
from collections.abc import Callable
from typing import get_args

from k3jax.checkpoints.packaged import DEFAULT
from k3jax.cli.joining import add_distributed, join
from k3jax.cli.output import check_folder, plan
from k3jax.cli.prompts import check_prompts, read_prompts
from k3jax.cli.quick_compiles import compile_quickly_on_cpus
from k3jax.cli.run_config import RunConfig, architecture_differences, build, collect
from k3jax.config import SamplerName


SETTINGS = {
    "checkpoint": "checkpoint",
    "output": "generate.output",
    "negative_prompt": "generate.negative_prompt",
    "height": "generate.height",
    "width": "generate.width",
    "steps": "generate.num_inference_steps",
    "guidance_scale": "generate.guidance_scale",
    "guidance_interval": "generate.guidance_interval",
    "sampler": "generate.sampler",
    "eta": "generate.eta",
    "num_images": "generate.num_images_per_prompt",
    "seed": "generate.seed",
    "mesh": "pipeline.mesh",
    "encoder_mesh": "pipeline.encoder_mesh",
    "dtype": "pipeline.dtype",
    "param_dtype": "pipeline.param_dtype",
    "int8_text_encoder": "pipeline.int8_text_encoder",
    "stream_text_encoder": "pipeline.stream_text_encoder",
    "batch_size": "pipeline.batch_size",
    "lora": "pipeline.lora",
    "lora_scale": "pipeline.lora_scale",
}
"""Flag -> key of RunConfig."""

IMAGES = "images (by default as the checkpoint says)"

NOTE = (
    "k3jax: note: no --checkpoint was given, so this is the small model of coloured shapes that "
    "comes with k3jax. For Kandinsky 3 itself: `k3jax convert kandinsky-community/kandinsky-3 DIR` "
    "(28 GB), then --checkpoint DIR."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_inputs(parser)
    add = parser.add_argument_group(IMAGES).add_argument
    add("-n", "--num-images", type=int, metavar="N", help="images of each prompt (1)")
    add("--height", type=int, metavar="PIXELS", help="a multiple of 64")
    add("--width", type=int, metavar="PIXELS", help="a multiple of 64")
    add_sampling(add)
    add_running(parser)
    add_distributed(parser)


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """What every command takes that makes images of prompts."""
    add = parser.add_argument
    add("prompts", metavar="PROMPT", nargs="*", help="what to see")
    add("--prompts-file", metavar="FILE", help="one prompt per line; - reads standard input")
    add("--checkpoint", metavar="DIR", help="a checkpoint made by `k3jax convert`")
    add("--lora", metavar="DIR", help="a LoRA trained on that checkpoint")
    add("--lora-scale", type=float, metavar="X", help="its strength (1)")
    add("-o", "--output", metavar="DIR", help="folder of the images (out); or, of one, a .png file")
    add("--overwrite", action="store_true", help="replace images that exist")


def add_sampling(add) -> None:
    """How an image is made; `add` is the add_argument of a group."""
    add("--seed", type=int, metavar="N", help="of the first image; the next ones count up (0)")
    add("--negative-prompt", metavar="TEXT", help="what not to see")
    add_sampler(add, guidance_scale="(W + 1) conditional - W unconditional")
    add("--eta", type=float, metavar="X", help="share of new noise in each step, 0 to 1")


def add_sampler(add: Callable, guidance_scale: str) -> None:
    """Which steps are made; `guidance_scale` is the help of that flag."""
    add("--sampler", choices=get_args(SamplerName), help="how the noise is removed")
    add("--steps", "--num-inference-steps", type=int, metavar="N", help="of the sampler")
    add("--guidance-scale", type=float, metavar="W", help=guidance_scale)
    add(
        "--guidance-interval",
        type=int,
        nargs=2,
        metavar=("FIRST", "LAST"),
        help="guide only these steps, counted from 0; the others cost half",
    )


def add_running(parser: argparse.ArgumentParser) -> None:
    """Where and in what precision it runs."""
    add = parser.add_argument_group("running").add_argument
    add("--mesh", help="devices, such as data=-1 (the default) or data=2,tensor=4")
    add("--encoder-mesh", metavar="MESH", help="for the text encoder (as --mesh)")
    add_dtypes(add)
    add_streaming(add)
    add("--batch-size", type=int, metavar="N", help="images at a time (one per device)")


def add_dtypes(add: Callable, default: str = "bfloat16; float32 without a checkpoint") -> None:
    add("--dtype", choices=("bfloat16", "float32"), help=f"of the computation ({default})")
    add("--param-dtype", choices=("bfloat16", "float32"), help="of the weights (as --dtype)")
    add(
        "--int8-text-encoder",
        action="store_true",
        default=None,
        help="its matrices in int8: half the memory",
    )


def add_streaming(add: Callable) -> None:
    add(
        "--stream-text-encoder",
        action="store_true",
        default=None,
        help="read its layers one by one instead of holding them: exact, and slower",
    )


def run(args: argparse.Namespace) -> None:
    compile_quickly_on_cpus()
    join(args.distributed, args.distributed_timeout)
    settings = {key: getattr(args, flag) for flag, key in SETTINGS.items()}
    values = collect(args.config, args.overrides, settings)
    prompts = read_prompts(args.prompts, args.prompts_file)
    checkpoint = asked_checkpoint(values, named_by_config=args.checkpoint is None)
    config = build(values, checkpoint.config)
    if values.get("model"):
        check_architecture(checkpoint, config)
    mesh, call = _check(config, prompts)
    images = plan(
        prompts,
        config.generate.num_images_per_prompt,
        config.generate.seed,
        config.generate.output,
        args.overwrite,
    )
    check_folder(images[0].path.parent)

    from k3jax.cli.batches import make_images
    from k3jax.pipelines.compilation_cache import enable_compilation_cache

    enable_compilation_cache()
    if values.get("checkpoint") is None:
        print(NOTE, file=sys.stderr)
    make_images(checkpoint, config, mesh, call, images, args.progress)


def asked_checkpoint(values, named_by_config: bool, default=DEFAULT):
    """The checkpoint that is asked for, its weights not read.

    Where none is, `values` get float32 as the default: small weights need no half precision, and
    XLA:CPU compiles their loop in 10 seconds instead of 16.
    """
    from k3jax.checkpoints.format import as_path, read_checkpoint

    path = values.get("checkpoint")
    if path is None:
        values.setdefault("pipeline", {}).setdefault("dtype", "float32")
        return read_checkpoint(default)
    if named_by_config and not as_path(path).exists():
        raise ValueError(
            f"the config's checkpoint {path} does not exist: make it with `k3jax convert`, or give "
            "--checkpoint DIR."
        )
    return read_checkpoint(path)


def check_architecture(checkpoint, config: RunConfig) -> None:
    differences = architecture_differences(checkpoint.config, config.model)
    if differences:
        raise ValueError(
            f"{checkpoint.path} is of another architecture than the config: {differences}; give "
            "the config of this checkpoint, or none."
        )


def _check(config: RunConfig, prompts: list[str]):
    """Everything that can be found out without the weights.

    Returns:
        The mesh, and the arguments that are equal for all calls of the pipeline.
    """
    check_prompts(prompts, config.generate.negative_prompt)

    from k3jax.cli.batches import check_memory, checked_mesh
    from k3jax.pipelines import call_inputs
    from k3jax.pipelines.options import TextToImageOptions
    from k3jax.sampling.denoise import loop_rows, sample_keys

    wanted, model = config.generate, config.model
    call_inputs.check_text_to_image(model)
    options = TextToImageOptions.from_sources(wanted)
    height, width = call_inputs.check_size(model, *options.size(model))
    sampler, loop = call_inputs.checked_sampler(options.sampler_config(model))
    loop_rows(loop, wanted.guidance_interval)
    if wanted.num_images_per_prompt < 1:
        raise ValueError(f"--num-images is {wanted.num_images_per_prompt}; it must be 1 or more.")
    count = len(prompts) * wanted.num_images_per_prompt
    call_inputs.guidance_scales(sampler.guidance_scale, count)
    sample_keys([wanted.seed, wanted.seed + count - 1])
    mesh = checked_mesh(config)
    guided = loop.guided and sampler.guidance_scale > 0
    check_memory(config, mesh, [(width, height)], guided)
    check_lora(config)
    call = {
        "negative_prompt": wanted.negative_prompt,
        "height": height,
        "width": width,
        "num_inference_steps": sampler.num_inference_steps,
        "guidance_scale": sampler.guidance_scale,
        "guidance_interval": wanted.guidance_interval,
        "sampler": sampler.name,
        "eta": sampler.eta,
    }
    return mesh, call


def check_lora(config: RunConfig) -> None:
    if config.pipeline.lora is None:
        if config.pipeline.lora_scale != 1:
            raise ValueError("--lora-scale is the strength of a LoRA: give its folder with --lora.")
        return

    from k3jax.checkpoints.lora_files import load_lora
    from k3jax.model import adapters
    from k3jax.model.abstract import abstract_module

    loaded = load_lora(config.pipeline.lora)
    adapters.update_factor(loaded.config, config.pipeline.lora_scale)
    unet = abstract_module("unet", config.model)
    adapters.check_fits(loaded.weights, unet, loaded.config, where=f"The LoRA {loaded.path}")
