# SPDX-License-Identifier: Apache-2.0
"""The settings of a run, from a config file, overrides of it, and flags, as one frozen dataclass.

ConfigDict and the texts of the command line end here: the rest of k3jax takes dataclasses. The
groups `pipeline`, `generate` and `edit` have one key for each option of the pipelines.
"""

import dataclasses
import difflib
import json
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Union, get_args, get_origin, get_type_hints

from k3jax.cli.config_files import load_config
from k3jax.config import ModelConfig, from_dict, to_dict
from k3jax.convert.options import ConvertConfig, ExportConfig
from k3jax.pipelines.load_options import LoadOptions, LoraOptions
from k3jax.pipelines.option_fields import config_fields
from k3jax.pipelines.options import ImageToImageOptions, InpaintOptions, TextToImageOptions
from k3jax.synthesis.options import SynthesizeConfig
from k3jax.training.train_config import TrainConfig


PipelineConfig = dataclasses.make_dataclass(
    "PipelineConfig", config_fields("pipeline", LoadOptions, LoraOptions), frozen=True
)
GenerateConfig = dataclasses.make_dataclass(
    "GenerateConfig",
    [("output", str, "out"), *config_fields("generate", TextToImageOptions)],
    frozen=True,
)
EditConfig = dataclasses.make_dataclass(
    "EditConfig", config_fields("edit", ImageToImageOptions, InpaintOptions), frozen=True
)


@dataclass(frozen=True)
class RunConfig:
    """All keys of a config file.

    Attributes:
        model: the architecture, the default sampler and the default size. A checkpoint has its own;
            a config that has this too must have the same architecture, and its sampler and size
            are used.
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
    """The values of a run as nested dicts, without defaults; later sources win.

    Args:
        config: name of one of k3jax.configs, or path of a .py file.
        overrides: (dotted key, text), such as ("model.unet.block_out_channels", "384,768").
        settings: dotted key -> value; None is ignored.

    Returns:
        The values; `model` is complete if the config has it.

    Raises:
        ValueError: no such config, an unknown key (with the nearest one), or a text that cannot be
            a value of its key.
    """
    values = {} if config is None else load_config(config)
    if values.get("model") is not None:
        values["model"] = to_dict(from_dict(ModelConfig, values["model"], f"{config}: model"))
    for key, text in overrides:
        _set(values, key, _parse(key_type(key), text, f"--config.{key}"))
    for key, value in (settings or {}).items():
        if value is not None:
            _set(values, key, value)
    return values


def build(values: Mapping[str, Any], model: ModelConfig | None = None) -> RunConfig:
    """The settings of a run from the values of `collect`.

    Args:
        model: that of the checkpoint; `values` win over it.

    Raises:
        ValueError: a value of the wrong type, with its key.
    """
    values = dict(values)
    if model is not None:
        values["model"] = _merged(to_dict(model), values.get("model") or {})
    return from_dict(RunConfig, values)


def architecture_differences(
    checkpoint: ModelConfig, config: ModelConfig, limit: int = 6
) -> str | None:
    """'unet.in_channels is 9 (config: 4), ...': the differences between two architectures, or None.

    The sampler and the size are not part of the architecture.
    """
    own, other = (dict(_leaves(to_dict(model))) for model in (checkpoint, config))
    parts = [
        f"{key} is {own[key]} (config: {other[key]})"
        for key in own
        if key != "sample_size" and not key.startswith("sampler.") and own[key] != other[key]
    ]
    if len(parts) > limit:
        parts = [*parts[:limit], f"{len(parts) - limit} more"]
    return ", ".join(parts) or None


def key_type(key: str) -> Any:
    """The type of a dotted key of RunConfig.

    Raises:
        ValueError: there is no such key; with the nearest one.
    """
    hint: Any = RunConfig
    for part in key.split("."):
        group = without_none(hint)
        hints = get_type_hints(group) if dataclasses.is_dataclass(group) else {}
        if part not in hints:
            known = list(_keys(RunConfig))
            # People leave out the group more often than they misspell a key.
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
            near = near or [k for k in known if k.endswith(f".{key.split('.')[-1]}")]
            near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            hints = f" (did you mean --config.{near[0]}?)" if near else ""
            raise ValueError(f"--config.{key} is not a setting{hints}.")
        hint = hints[part]
    return hint


def without_none(hint: Any) -> Any:
    """X of `X | None`."""
    if not _is_optional(hint):
        return hint
    return next(arg for arg in get_args(hint) if arg is not types.NoneType)


def _is_optional(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _keys(cls: type, prefix: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(cls).items():
        if dataclasses.is_dataclass(without_none(hint)):
            yield from _keys(without_none(hint), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
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


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *groups, last = key.split(".")
    for group in groups:
        if not isinstance(values.get(group), dict):
            values[group] = {}
        values = values[group]
    values[last] = value


def _parse(hint: Any, text: str, where: str) -> Any:
    """A value of a type from a text. `from_dict` checks what this does not."""
    if _is_optional(hint) and text.lower() in ("none", "null"):
        return None
    hint = without_none(hint)
    if dataclasses.is_dataclass(hint):
        inside = ", ".join(f"{where}.{name}" for name in list(get_type_hints(hint))[:3])
        raise ValueError(f"{where} is a group of settings: set one of its keys ({inside}, ...).")
    if get_origin(hint) is tuple:
        return tuple(_parse(get_args(hint)[0], part, where) for part in parts(text))
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


def parts(text: str) -> list[str]:
    """The elements of "384,768", "(384, 768)" or the JSON "[384, 768]"."""
    try:
        values = json.loads(text)
    except ValueError:
        values = text.strip().removeprefix("(").removesuffix(")").split(",")
    values = values if isinstance(values, list) else [values]
    texts = [v.strip() if isinstance(v, str) else json.dumps(v) for v in values]
    return [text for text in texts if text]
