# SPDX-License-Identifier: Apache-2.0
"""What a run is told: a config file, overrides of it, and flags, as one frozen dataclass.

A config file has a function get_config() that returns an ml_collections ConfigDict. It and the
texts of the command line stop here: only `RunConfig` goes on.
"""

import dataclasses
import difflib
import importlib.util
import json
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from k3jax.config import ModelConfig, SamplerName, from_dict, suggestion, to_dict
from k3jax.convert.options import ConvertConfig, ExportConfig
from k3jax.synthesis.options import SynthesizeConfig
from k3jax.training.train_config import TrainConfig


Dtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class PipelineConfig:
    """How the model runs."""

    mesh: str = "data=-1"
    encoder_mesh: str | None = None
    """Of the text encoder, over the same devices; `mesh` by default."""
    dtype: Dtype = "bfloat16"
    """Of the computation."""
    param_dtype: Dtype | None = None
    """Of the weights; that of the computation by default."""
    int8_text_encoder: bool = False
    """The matrices of the text encoder in int8; see `k3jax.model.int8`."""
    stream_text_encoder: bool = False
    """Read it layer by layer whenever prompts are encoded; see `k3jax.pipelines.streaming`."""
    batch_size: int | None = None
    """Images per compiled batch over the whole mesh; one per device by default."""
    lora: str | None = None
    """Folder of a LoRA for the U-Net."""
    lora_scale: float = 1.0
    """Its strength; 1 as it was trained."""


@dataclass(frozen=True)
class GenerateConfig:
    """What is made; None leaves it to the checkpoint."""

    output: str = "out"
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[int, int] | None = None
    sampler: SamplerName | None = None
    eta: float | None = None
    num_images_per_prompt: int = 1
    seed: int = 0


@dataclass(frozen=True)
class EditConfig:
    """How `img2img`, `inpaint` and `outpaint` change images; None leaves it to the pipeline."""

    strength: float | None = None
    max_area: int | None = None
    feather: float | None = None


@dataclass(frozen=True)
class RunConfig:
    """Everything that a config file can say.

    Attributes:
        model: the architecture, the sampler's defaults and the usual size. A checkpoint brings its
            own; where a config has this too, the architectures must be equal, and the sampler and
            size of the config count.
        checkpoint: folder, or the name of one that comes with k3jax; None: "tiny".
    """

    model: ModelConfig | None = None
    checkpoint: str | None = None
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    edit: EditConfig = field(default_factory=EditConfig)
    synthesize: SynthesizeConfig = field(default_factory=SynthesizeConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def collect(
    config: str | None = None,
    overrides: Iterable[tuple[str, str]] = (),
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Nested values of a run; what comes later wins.

    Args:
        config: name of one of k3jax.configs, or path of a .py file.
        overrides: (dotted key, text), such as ("model.unet.block_out_channels", "384,768").
        settings: dotted key -> value; None is passed over.

    Returns:
        What was said, and no defaults. `model` is complete if the config has it.

    Raises:
        ValueError: one sentence: no such config, or an unknown key (with the nearest), or a text
            that is no value for its key.
    """
    values = {} if config is None else load_config(config)
    if values.get("model") is not None:
        values["model"] = to_dict(from_dict(ModelConfig, values["model"], f"{config}: model"))
    for key, text in overrides:
        _put(values, key, _parse(_hint(key), text, f"--config.{key}"))
    for key, value in (settings or {}).items():
        if value is not None:
            _put(values, key, value)
    return values


def build(values: Mapping[str, Any], model: ModelConfig | None = None) -> RunConfig:
    """The run that `collect` describes.

    Args:
        model: the checkpoint's own; what `values` says of the model is laid over it.

    Raises:
        ValueError: a value of the wrong type, with its key.
    """
    values = dict(values)
    if model is not None:
        values["model"] = _merged(to_dict(model), values.get("model") or {})
    return from_dict(RunConfig, values)


def config_names() -> list[str]:
    """The configs that come with k3jax."""
    return sorted(p.stem for p in _configs().glob("*.py") if not p.stem.startswith("_"))


def load_config(name: str) -> dict[str, Any]:
    """The values of a config file as nested dicts.

    Args:
        name: of one of k3jax.configs, or the path of a .py file.

    Raises:
        ValueError: no such config (with the nearest), or one without a get_config() that works.
    """
    path = _configs() / f"{name}.py"
    if name.endswith(".py") or "/" in name:
        path = Path(name).expanduser()
        if not path.is_file():
            raise ValueError(f"the config file {name} does not exist.")
    elif name not in config_names():
        raise ValueError(
            f"there is no config {name!r}{suggestion(name, set(config_names()))}; "
            "a file of your own ends in .py."
        )
    spec = importlib.util.spec_from_file_location(f"k3jax_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
        return config.to_dict() if hasattr(config, "to_dict") else dict(config)
    except Exception as error:
        raise ValueError(
            f"{path}: get_config() cannot be run ({type(error).__name__}: {error})."
        ) from error


def architecture_differences(theirs: ModelConfig, ours: ModelConfig, limit: int = 6) -> str | None:
    """'unet.in_channels is 9 (config: 4), ...': what differs in what weights were trained with.

    The sampler and the size are not part of that. None when nothing differs.
    """
    flat = [dict(_leaves(to_dict(model))) for model in (theirs, ours)]
    parts = [
        f"{key} is {flat[0][key]} (config: {flat[1][key]})"
        for key in flat[0]
        if key != "sample_size" and not key.startswith("sampler.") and flat[0][key] != flat[1][key]
    ]
    if len(parts) > limit:
        parts = [*parts[:limit], f"{len(parts) - limit} more"]
    return ", ".join(parts) or None


def _configs() -> Path:
    from k3jax import configs

    return Path(configs.__file__).parent


def _leaves(values: Mapping[str, Any], prefix: str = ""):
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        deeper = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        merged[key] = _merged(base[key], value) if deeper else value
    return merged


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *groups, last = key.split(".")
    for group in groups:
        if not isinstance(values.get(group), dict):
            values[group] = {}
        values = values[group]
    values[last] = value


def _hint(key: str) -> Any:
    """The type of a dotted key of RunConfig."""
    hint: Any = RunConfig
    for part in key.split("."):
        hints = get_type_hints(_inner(hint)) if dataclasses.is_dataclass(_inner(hint)) else {}
        if part not in hints:
            known = list(_keys(RunConfig))
            # The last part alone as well: people forget the group more often than they misspell.
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
            near = near or [k for k in known if k.endswith(f".{key.split('.')[-1]}")]
            near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            hints = f" (did you mean --config.{near[0]}?)" if near else ""
            raise ValueError(f"--config.{key} is not a setting{hints}.")
        hint = hints[part]
    return hint


def _keys(cls: type, prefix: str = ""):
    for name, hint in get_type_hints(cls).items():
        if dataclasses.is_dataclass(_inner(hint)):
            yield from _keys(_inner(hint), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _optional(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _inner(hint: Any) -> Any:
    """X of `X | None`."""
    if not _optional(hint):
        return hint
    return next(arg for arg in get_args(hint) if arg is not types.NoneType)


def _parse(hint: Any, text: str, where: str) -> Any:
    """A value for a hint from a text; `from_dict` checks what this lets pass."""
    if _optional(hint) and text.lower() in ("none", "null"):
        return None
    hint = _inner(hint)
    if dataclasses.is_dataclass(hint):
        inside = ", ".join(f"{where}.{name}" for name in list(get_type_hints(hint))[:3])
        raise ValueError(f"{where} is a group of settings: set those inside ({inside}, ...).")
    if get_origin(hint) is tuple:
        return tuple(_parse(get_args(hint)[0], part, where) for part in _parts(text))
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{where} must be true or false, not {text!r}.")
        return text.lower() == "true"
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            kind = "a whole number" if hint is int else "a number"
            raise ValueError(f"{where} must be {kind}, not {text!r}.") from None
    return text


def _parts(text: str) -> list[str]:
    """The elements of "384,768", "(384, 768)" or the JSON "[384, 768]"."""
    try:
        values = json.loads(text)
    except ValueError:
        values = text.strip().removeprefix("(").removesuffix(")").split(",")
    values = values if isinstance(values, list) else [values]
    texts = [v.strip() if isinstance(v, str) else json.dumps(v) for v in values]
    return [text for text in texts if text]
