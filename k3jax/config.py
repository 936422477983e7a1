# SPDX-License-Identifier: Apache-2.0
"""Architecture and sampler settings as frozen dataclasses.

The defaults are the released Kandinsky 3 model. Names are those of diffusers and transformers where
these have one. ``from_dict`` is the only door by which outside data (config.json, ml_collections)
becomes a config; it refuses what it does not know.
"""

import dataclasses
import difflib
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from k3jax.config_limits import check_movq, check_sizes, check_text_encoder, check_unet


AttentionForm = Literal["auto", "xla", "kernel"]
"""Which form long attention takes: the platform's best, XLA's operations alone, or a kernel."""

MAX_TOKENS = 128
"""Tokens of a prompt that the model sees, end-of-sequence included; the same in all references."""

COMPONENTS = ("text_encoder", "text_projection", "unet", "movq")
"""The parts of a model, in the order in which data flows through them."""

MOST_FLOAT = 10**300

ConditioningFamily = Literal["original", "diffusers"]
SamplerName = Literal["kandinsky", "kandinsky30", "ddpm", "ddim", "dpm++2m", "flash"]
PredictionType = Literal["epsilon", "sample", "v_prediction"]


@dataclass(frozen=True)
class TextEncoderConfig:
    """Encoder half of Flan-UL2; field names as in transformers' T5Config."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 256
    d_ff: int = 16384
    num_layers: int = 32
    num_heads: int = 16
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6


@dataclass(frozen=True)
class TextProjectionConfig:
    """Linear + LayerNorm from the text encoder's width to the U-Net's context width."""

    d_model: int = 4096
    cross_attention_dim: int = 4096
    null_embedding: bool = True
    """Whether the checkpoint has a learned unconditional embedding (the `original` family does)."""


@dataclass(frozen=True)
class UNetConfig:
    in_channels: int = 4
    """4, or 9 for inpainting: latents (4), mask (1), masked-image latents (4)."""
    out_channels: int = 4
    init_channels: int = 192
    block_out_channels: tuple[int, ...] = (384, 768, 1536, 3072)
    layers_per_block: int = 3
    time_embedding_dim: int = 1536
    cross_attention_dim: int = 4096
    attention_head_dim: int = 64
    groups: int = 32
    expansion_ratio: int = 4
    compression_ratio: int = 2
    add_cross_attention: tuple[bool, ...] = (False, True, True, True)
    add_self_attention: tuple[bool, ...] = (False, True, True, True)

    def __post_init__(self):
        if self.layers_per_block < 2:
            raise ValueError(
                f"unet.layers_per_block is {self.layers_per_block}; the up path needs at least 2."
            )
        levels = len(self.block_out_channels)
        if min(len(self.add_cross_attention), len(self.add_self_attention)) < levels:
            raise ValueError(
                f"unet has {levels} levels but attention flags for fewer: give add_cross_attention "
                "and add_self_attention one entry per level."
            )


@dataclass(frozen=True)
class MoVQConfig:
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (256, 512, 512, 1024)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    """Groups of the encoder's norms; the decoder's spatial norms always have 32."""
    num_vq_embeddings: int = 0
    """Rows of the codebook that a diffusers checkpoint carries; never used to decode. 0: none."""
    vq_embed_dim: int = 4

    @property
    def scale_factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class SamplerConfig:
    """Default sampler of a checkpoint. Every field can be overridden in a pipeline call."""

    name: SamplerName = "kandinsky"
    num_inference_steps: int = 50
    guidance_scale: float = 3.0
    eta: float = 1.0
    threshold_percentile: float = 0.99
    """Dynamic thresholding of `kandinsky` and `kandinsky30`; inpainting uses 0.95."""

    # What follows is diffusers' scheduler_config.json, for `ddpm`, `ddim` and `dpm++2m`.
    num_train_timesteps: int = 1000
    beta_schedule: str = "squaredcos_cap_v2"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading"
    steps_offset: int = 1
    prediction_type: PredictionType = "epsilon"
    variance_type: str = "fixed_small"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    set_alpha_to_one: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a checkpoint and its sampler, as in config.json."""

    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    text_projection: TextProjectionConfig = field(default_factory=TextProjectionConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    movq: MoVQConfig = field(default_factory=MoVQConfig)
    conditioning: ConditioningFamily = "original"
    sample_size: int = 1024
    """Height and width in pixels of an image when a call names none."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def __post_init__(self):
        check_sizes(self)
        check_text_encoder(self.text_encoder)
        check_unet(self.unet)
        check_movq(self.movq)
        widths = {
            "text_encoder.d_model": (self.text_encoder.d_model, self.text_projection.d_model),
            "unet.cross_attention_dim": (
                self.unet.cross_attention_dim,
                self.text_projection.cross_attention_dim,
            ),
        }
        for name, (ours, projection) in widths.items():
            if ours != projection:
                raise ValueError(
                    f"{name} is {ours} but the text projection has {projection}: "
                    "the components belong to different models."
                )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank updates of attention projections (arXiv:2106.09685)."""

    rank: int = 16
    alpha: float | None = None
    """Updates are scaled by alpha / rank; None: alpha = rank."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out")
    """Names of the projections, wherever they occur in the U-Net's attention."""


T = TypeVar("T")


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "config") -> T:
    """Builds a config dataclass from nested mappings, refusing unknown keys and wrong types.

    Raises:
        ValueError: one sentence naming the key, its place, and the nearest known key.
    """
    hints = get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    kwargs = {}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{where} has no key {key!r}{suggestion(key, known)}.")
        kwargs[key] = _coerce(hints[key], value, f"{where}.{key}")
    return cls(**kwargs)


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of `from_dict`, with tuples as lists so that JSON round-trips."""
    return {
        k: list(v) if isinstance(v, tuple) else v
        for k, v in ((f.name, _plain(getattr(config, f.name))) for f in dataclasses.fields(config))
    }


def suggestion(key: str, known: set[str]) -> str:
    """' (did you mean ...?)' for the nearest known key, or the list of keys when none is near."""
    near = difflib.get_close_matches(key, known, n=1)
    if near:
        return f" (did you mean {near[0]!r}?)"
    return f" (known: {', '.join(sorted(known))})"


def _plain(value):
    return to_dict(value) if dataclasses.is_dataclass(value) else value


def _coerce(hint, value, where):
    if get_origin(hint) in (Union, types.UnionType):  # only `X | None`
        if value is None:
            return None
        hint = next(arg for arg in get_args(hint) if arg is not types.NoneType)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be a group of settings, not {value!r}.")
        return from_dict(hint, value, where)
    origin = getattr(hint, "__origin__", hint)
    if origin is Literal:
        if value not in hint.__args__:
            raise ValueError(f"{where} is {value!r}; it must be one of {list(hint.__args__)}.")
        return value
    if origin is tuple:
        element = hint.__args__[0]
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise ValueError(f"{where} must be a list, not {value!r}.")
        if Ellipsis not in hint.__args__ and len(value) != len(hint.__args__):
            raise ValueError(f"{where} must have {len(hint.__args__)} values, not {value!r}.")
        return tuple(_coerce(element, v, where) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > MOST_FLOAT:
            raise ValueError(f"{where} must be a float of at most 300 digits.")
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where} must be {hint.__name__}, not {value!r}.")
    return value
