# SPDX-License-Identifier: Apache-2.0
"""The three programs of a batch of images, lowered for devices that need not exist.

They are the pipeline's functions with its arguments (pipelines/generation.py),
only without values: weights and inputs are ShapeDtypeStructs. Small programs (projection of the
text, first noise) are left out: they take less than a thousandth of the time.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from k3jax.config import MAX_TOKENS, ModelConfig, SamplerConfig, from_dict, to_dict
from k3jax.model.abstract import abstract_module
from k3jax.model.conditioning import Conditioning
from k3jax.model.context import Context
from k3jax.model.int8 import with_int8_layers
from k3jax.pipelines.load_options import LoadOptions
from k3jax.pipelines.options import TextToImageOptions
from k3jax.pipelines.programs import computing, decode_latents, encode_text
from k3jax.planning.chips import Slice
from k3jax.planning.throughput import Evaluations
from k3jax.sampling.denoise import LoopState, denoise_program, loop_rows
from k3jax.sampling.samplers import make_sampler
from k3jax.sharding import MESH_AXES, batch_sharding, data_parallelism, placed


Name = Literal["encode", "denoise", "denoise_plain", "decode"]
COMPONENT: dict[str, str] = {
    "encode": "text_encoder",
    "denoise": "unet",
    "denoise_plain": "unet",
    "decode": "movq",
}
"""Program -> the component that it runs. `denoise` is a guided step, `denoise_plain` is not."""

DENOISER = ("text_projection", "unet", "movq")
"""Components that are in memory at the same time in any case."""


TITLES = {
    "encode": "text encoder",
    "denoise": "denoising step",
    "denoise_plain": "step without guidance",
    "decode": "decoder",
}
PARTS = ("encode", "denoise", "decode")
"""The choices of --programs; `denoise` includes steps without guidance, if any."""


@dataclass(frozen=True)
class Work:
    """What a program is compiled for.

    Attributes:
        model: the architecture, and the sampler whose step is compiled.
        mesh: axis -> size.
        batch: images on each chip, see `images`.
        height, width: in pixels.
        dtype, param_dtype: of the computation and of the weights.
        int8_text_encoder: the matrices of its layers are int8.
    """

    model: ModelConfig
    mesh: dict[str, int]
    batch: int
    height: int
    width: int
    dtype: str = "bfloat16"
    param_dtype: str = "bfloat16"
    int8_text_encoder: bool = False

    @property
    def images(self) -> int:
        """Images that the slice makes at a time: `batch` on each part that the mesh splits them in.

        Chips along `tensor` work on the same images.
        """
        return self.batch * self.mesh["data"] * self.mesh["fsdp"]

    def to_json(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return fields | {"model": to_dict(self.model)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Work":
        return cls(**{**values, "model": from_dict(ModelConfig, values["model"])})


@dataclass(frozen=True)
class PlanOptions:
    """The options of a plan: those of a call and of loading, and the slice it is planned for.

    Attributes:
        model: as the checkpoint or config has it.
        call: size, sampler and guidance of the images.
        load: dtypes and meshes; encoder_mesh None: as `mesh`, or split by `fsdp` over as few chips
            as the text encoder's weights need.
        batch: images on each chip.
        parts: of PARTS.
        price: dollars for a chip and an hour.
    """

    where: Slice
    model: ModelConfig
    call: TextToImageOptions
    load: LoadOptions
    batch: int = 1
    parts: tuple[str, ...] = PARTS
    price: float | None = None

    @property
    def sampler(self) -> SamplerConfig:
        return self.call.sampler_config(self.model)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.call.size(self.model)

    @property
    def param_dtype(self) -> str:
        return self.load.param_dtype or self.load.dtype

    def work(self, mesh: dict[str, int], batch: int) -> "Work":
        """The workload on a mesh of these sizes."""
        model = dataclasses.replace(self.model, sampler=self.sampler)
        dtypes = self.load.dtype, self.param_dtype, self.load.int8_text_encoder
        return Work(model, mesh, batch, *self.size, *dtypes)


def program_names(parts: tuple[str, ...], counts: Evaluations) -> list[Name]:
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise ValueError(f"--programs {','.join(parts)!r}: choose of {', '.join(PARTS)}.")
    names: list[Name] = []
    for part in PARTS:
        if part in parts and part != "denoise":
            names.append(part)
        elif part in parts:
            names += ["denoise"] * (counts.guided > 0) + ["denoise_plain"] * (counts.plain > 0)
    return names


def lower(program: Name, work: Work, mesh: Mesh) -> jax.stages.Lowered:
    """A program traced for a mesh with the sizes of `work.mesh`."""
    inputs = arguments(program, work, mesh)
    with computing(mesh, work.dtype):
        if program == "encode":
            return encode_text.lower(*inputs)
        if program == "decode":
            return decode_latents.lower(*inputs, splits=data_parallelism(mesh), as_uint8=True)
        sampler = make_sampler(work.model.sampler)
        return denoise_program.lower(*inputs, step=sampler.step, renoise=sampler.renoise)


def arguments(program: Name, work: Work, mesh: Mesh) -> tuple:
    """What the compiled program is called with, as ShapeDtypeStructs: the module comes first."""
    module = placed(_abstract(_key(COMPONENT[program], work)), mesh)
    return module, *_inputs(program, work, mesh)


def weight_bytes(component: str, work: Work) -> int:
    """Bytes of a component's weights on each chip."""
    return _weight_bytes(_key(component, work), tuple(work.mesh[axis] for axis in MESH_AXES))


def input_bytes(program: Name, work: Work) -> int:
    """Bytes of a program's inputs on each chip, without the weights."""
    sizes = tuple(work.mesh[axis] for axis in MESH_AXES)
    return _bytes_per_chip(_inputs(program, work, AbstractMesh(sizes, MESH_AXES)))


Key = tuple[str, ModelConfig, str, str, bool]
"""What the weights of a component depend on; what follows is cached by it, since it takes seconds
at full size and each batch and mesh needs it."""


def _key(component: str, work: Work) -> Key:
    model = dataclasses.replace(work.model, sampler=SamplerConfig())  # which has no weights
    int8 = component == "text_encoder" and work.int8_text_encoder
    return component, model, work.param_dtype, work.dtype, int8


@functools.lru_cache(maxsize=16)
def _abstract(key: Key) -> nnx.Module:
    """Never changed."""
    component, model, param_dtype, dtype, int8 = key
    module = abstract_module(component, model, param_dtype, dtype)
    return with_int8_layers(module) if int8 else module


@functools.lru_cache(maxsize=64)
def _weight_bytes(key: Key, sizes: tuple[int, ...]) -> int:
    return _bytes_per_chip(placed(_abstract(key), AbstractMesh(sizes, MESH_AXES)))


@functools.lru_cache(maxsize=64)
def _context_cache(key: Key, images: int):
    """The U-Net's keys and values of that many images, without shardings."""
    _, model, _, dtype, _ = key
    context = Context(
        jax.ShapeDtypeStruct((images, MAX_TOKENS, model.unet.cross_attention_dim), dtype),
        jax.ShapeDtypeStruct((images, MAX_TOKENS), jnp.float32),
        jax.ShapeDtypeStruct((images,), jnp.int32),
    )
    return jax.eval_shape(
        lambda unet, context: unet.context_cache(context), _abstract(key), context
    )


def _bytes_per_chip(tree) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _inputs(program: Name, work: Work, mesh: Mesh | AbstractMesh) -> tuple:
    """The positional arguments after the module."""
    b, split = work.images, batch_sharding(mesh)

    def struct(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=split)

    if program == "encode":
        ids = struct(b, MAX_TOKENS, dtype=jnp.int32)
        return ids, struct(b, MAX_TOKENS, dtype=jnp.bool_)
    movq, unet = work.model.movq, work.model.unet
    latent = work.height // movq.scale_factor, work.width // movq.scale_factor
    latents = struct(b, *latent, movq.latent_channels)
    if program == "decode":
        return (latents,)

    cache = _context_cache(_key("unet", work), b)
    cache = jax.tree.map(lambda x: struct(*x.shape, dtype=x.dtype), cache)
    guided = program == "denoise"
    more = unet.in_channels - movq.latent_channels  # mask and masked latents of inpainting
    sampler = make_sampler(work.model.sampler)
    everywhere = NamedSharding(mesh, PartitionSpec())
    # One step, without the inactive rows of the pipeline's loop: times are multiplied by steps.
    rows = {
        name: jax.ShapeDtypeStruct((1,), column.dtype, sharding=everywhere)
        for name, column in loop_rows(sampler).items()
    }
    conditioning = Conditioning(
        context=cache,
        unconditional=cache if guided else None,
        guidance_scale=struct(b) if guided else None,
        extra_channels=struct(b, *latent, more) if more else None,
    )
    keys = struct(b, 2, dtype=jnp.uint32) if sampler.stochastic else None
    return conditioning, LoopState(latents, latents), rows, keys, None
