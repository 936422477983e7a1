# SPDX-License-Identifier: Apache-2.0
"""Every argument of loading a checkpoint, once; see k3jax/pipelines/options.py."""

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from k3jax.arguments import Dtype, check_dtype, check_number, shown, whole_number
from k3jax.config import AttentionForm
from k3jax.pipelines.option_fields import Options, option


if TYPE_CHECKING:
    from jax.sharding import Mesh

TextEncoderForm = Literal["whole", "int8", "streamed"]
"""How the text encoder is held: as it is, in int8, or layer by layer (pipelines/streaming.py)."""

pipeline = functools.partial(option, group="pipeline")


def check_mesh(value: Any, name: str) -> "str | Mesh":
    """Axis sizes as text, or a mesh; `k3jax.sharding.make_mesh` checks the text."""
    if isinstance(value, str) or (hasattr(value, "axis_names") and hasattr(value, "devices")):
        return value
    raise ValueError(
        f'{name} is {shown(value)}; it must be a mesh, or axis sizes such as "data=-1,tensor=2".'
    )


def check_component(value: Any, name: str) -> str:
    from k3jax.config import COMPONENTS

    if isinstance(value, str) and value in COMPONENTS:
        return value
    known = ", ".join(COMPONENTS)
    raise ValueError(f"{name} names {shown(value)}, which is not one of {known}.")


def check_components(value: Any, name: str) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Collection):
        raise ValueError(f"{name} is {shown(value)}; it must be a list of names of components.")
    return tuple(check_component(one, name) for one in value)


def check_dtypes(value: Any, name: str) -> str | dict[str, str]:
    """One dtype, or component -> dtype."""
    if not isinstance(value, Mapping):
        return check_dtype(value, name)
    return {
        check_component(key, name): check_dtype(one, f"{name}[{key!r}]")
        for key, one in value.items()
    }


def check_folder(value: Any, name: str) -> str:
    if isinstance(value, str) or hasattr(value, "__fspath__"):
        return str(value)
    raise ValueError(f"{name} is {shown(value)}; it must be the path of a folder.")


CONVERTED = "a checkpoint is a folder made by `k3jax convert`; leave it out"
MESH = "give mesh; JAX uses all its devices by default"


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadOptions(Options):
    """Options of loading a checkpoint.

    Raises:
        ValueError: a value that is wrong, or a text encoder both in int8 and streamed.
    """

    advice: ClassVar[Mapping[str, str]] = {
        "torch_dtype": 'give dtype, "bfloat16" or "float32"',
        "variant": 'give dtype="bfloat16" for half precision',
        "device": MESH,
        "device_map": MESH,
        "use_safetensors": CONVERTED,
        "cache_dir": CONVERTED,
        "revision": CONVERTED,
        "safety_checker": "there is none; leave it out",
    }

    mesh: "str | Mesh" = pipeline(
        "data=-1",
        "devices, such as data=-1 or data=2,tensor=4. Or a mesh",
        check_mesh,
        "--mesh MESH",
    )
    encoder_mesh: "str | Mesh | None" = pipeline(
        None,
        "devices of the text encoder (as --mesh). Another mesh over the same devices: "
        '"tensor=-1" splits it over all of them, where with mesh="data=-1" each has a U-Net of '
        "its own",
        check_mesh,
        "--encoder-mesh MESH",
    )
    dtype: Dtype | Mapping[str, Dtype] = pipeline(
        "bfloat16",
        'dtype of the computation. Or one for each component, as {"movq": "float32"}: bfloat16 '
        "where none is named",
        check_dtypes,
        "--dtype",
    )
    param_dtype: Dtype | None = pipeline(
        None, "dtype of the weights (as --dtype)", check_dtype, "--param-dtype"
    )
    batch_size: int | None = pipeline(
        None,
        "images at a time (one per device). Images per compiled batch over the whole mesh: a call "
        "of any other size is cut into such batches, the last one padded",
        functools.partial(whole_number, least=1),
        "--batch-size N",
    )
    verify: bool | None = option(
        None, "check the files' checksums first. See `k3jax.checkpoints.restore.restore`"
    )
    int8_text_encoder: bool = pipeline(
        False,
        "its matrices in int8: half the memory. See `k3jax.model.int8`",
        flag="--int8-text-encoder",
    )
    stream_text_encoder: bool = pipeline(
        False,
        "read its layers one by one instead of holding them: exact, and slower. See "
        "`k3jax.pipelines.streaming`",
        flag="--stream-text-encoder",
    )
    components: Collection[str] | None = option(
        None,
        "load only these, by the names in `k3jax.config.COMPONENTS`. Where not all fit, "
        'prompts are encoded with ("text_encoder",), and their embeddings given to a pipeline of '
        "the others",
        check_components,
    )
    attention: AttentionForm = pipeline(
        "auto",
        "attention by XLA or by the TPU kernel; auto takes the kernel on TPUs",
        flag="--attention",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.int8_text_encoder and self.stream_text_encoder:
            raise ValueError(
                "the text encoder is either in int8 or streamed: choose one of int8_text_encoder "
                "(--int8-text-encoder) and stream_text_encoder (--stream-text-encoder)."
            )

    @property
    def text_encoder_form(self) -> TextEncoderForm:
        """How the text encoder is held."""
        if self.int8_text_encoder:
            return "int8"
        return "streamed" if self.stream_text_encoder else "whole"

    def dtypes_of(self, component: str) -> tuple[str, str]:
        """(of the computation, of the weights) of a component."""
        dtype = self.dtype
        if isinstance(dtype, Mapping):
            # The projection belongs to the text, wherever it is stored.
            other = "text_encoder" if component == "text_projection" else component
            dtype = dtype.get(component) or dtype.get(other, "bfloat16")
        return dtype, self.param_dtype or dtype


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraOptions(Options):
    """Options of a LoRA over the U-Net, for the command line and configs."""

    lora: str | None = pipeline(
        None, "a LoRA trained on that checkpoint", check_folder, "--lora DIR"
    )
    lora_scale: float = pipeline(1.0, "strength of the LoRA", check_number, "--lora-scale X")
