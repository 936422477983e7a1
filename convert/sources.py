# SPDX-License-Identifier: Apache-2.0
"""A PyTorch checkpoint of any known layout, opened but not read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from k3jax.config import ModelConfig, SamplerConfig, TextEncoderConfig, from_dict, to_dict
from k3jax.convert import keys
from k3jax.convert.architecture import (
    Shapes,
    inferred_movq,
    inferred_projection,
    inferred_text_encoder,
    inferred_unet,
    model_config,
    original_sampler,
    with_own_settings,
)
from k3jax.convert.diffusers_json import (
    movq_config,
    sampler_config,
    text_encoder_config,
    unet_config,
)
from k3jax.convert.hub import fetch
from k3jax.convert.layouts import Layout, find_layout
from k3jax.convert.rules import ConversionError, Table
from k3jax.convert.tensors import Tensors, flat, open_pickle, open_weights, shapes, unwrapped
from k3jax.files import read_object


@dataclass
class WeightSource:
    layout: str
    """`diffusers`, `original` (3.1) or `original30`."""
    variant: str
    origin: dict[str, str]
    """{"path": ...} or {"repo": ...}."""
    tensors: dict[str, Tensors]
    """Component -> its tensors under PyTorch's names."""
    tables: dict[str, Table]
    config: ModelConfig
    tokenizer: list[Path]


def open_source(
    source: str | Path,
    *,
    variant: str = "base",
    weights_variant: str | None = None,
    shared_text_encoder: TextEncoderConfig | None = None,
    architecture: Mapping[str, Mapping] | None = None,
) -> WeightSource:
    """Finds and opens a checkpoint; downloads it first when `source` is a Hugging Face id.

    Args:
        source: folder or `owner/name`.
        variant: base, flash or inpainting; which of the original files.
        weights_variant: `fp16` for files named *.fp16.*.
        shared_text_encoder: configuration of the encoder of another checkpoint, which is used
            instead of the source's.
        architecture: settings that override config.json or the shapes, by component; for
            models whose groups or head dim, which leave no trace in shapes, are unusual.

    Raises:
        ConversionError: one sentence; nothing is written before.
    """
    root, found, origin = fetch(
        source,
        lambda names, where, read_bytes: find_layout(
            names,
            where,
            variant=variant,
            weights_variant=weights_variant,
            text_encoder=shared_text_encoder is None,
            read_bytes=read_bytes,
        ),
    )
    opened = (_diffusers if found.kind == "diffusers" else _original)(root, found, variant)
    if shared_text_encoder is not None:
        opened.parts["text_encoder"] = shared_text_encoder
    for component, values in (architecture or {}).items():
        if component not in opened.parts:
            raise ConversionError(f"architecture names {component!r}, which is no component here.")
        part = opened.parts[component]
        opened.parts[component] = from_dict(type(part), {**to_dict(part), **values}, component)
    return WeightSource(
        layout=opened.layout,
        variant=variant,
        origin=origin,
        tensors=opened.tensors,
        tables=opened.tables,
        config=model_config(str(source), **opened.parts),
        tokenizer=[root / name for name in found.tokenizer],
    )


@dataclass
class _Opened:
    layout: str
    tensors: dict[str, Tensors]
    tables: dict[str, Table]
    parts: dict


def _diffusers(root: Path, found: Layout, variant: str) -> _Opened:
    tensors = {c: open_weights(root / f for f in files) for c, files in found.weights.items()}
    json_of = {name: _json(root / file) for name, file in found.configs.items()}
    # Early uploads have the authors' names in this layout, those of the projection included.
    old = "in_layer.weight" in tensors["unet"]
    tables = {
        "text_projection": keys.table("text_projection", "fork" if old else "diffusers"),
        "unet": keys.table("unet", "original" if old else "diffusers"),
        "movq": keys.table("movq"),
    }
    tensors["text_projection"], tensors["unet"] = _split(tables["text_projection"], tensors["unet"])
    if old:
        unet_part = inferred_unet(Shapes(tables["unet"], shapes(tensors["unet"])))
        projection = inferred_projection(
            Shapes(tables["text_projection"], shapes(tensors["text_projection"]))
        )
    else:
        unet_part, projection = unet_config(json_of["unet"], str(root / found.configs["unet"]))
    if "scheduler" in json_of:
        sampler = sampler_config(json_of["scheduler"], str(root / found.configs["scheduler"]))
    else:
        sampler = SamplerConfig(name="ddpm", num_inference_steps=25)
    parts = {
        "text_projection": projection,
        "unet": unet_part,
        "movq": movq_config(json_of["movq"], str(root / found.configs["movq"])),
        "conditioning": "diffusers",
        "sampler": sampler,
    }
    parts = _with_own_settings(parts, root, found)
    if variant == "flash" and parts["sampler"].name != "flash":
        parts["sampler"] = original_sampler("diffusers", variant)
    if "text_encoder" in tensors:
        tables["text_encoder"] = keys.table("text_encoder")
        parts["text_encoder"] = text_encoder_config(
            json_of["text_encoder"], str(root / found.configs["text_encoder"])
        )
    return _Opened("diffusers", tensors, tables, parts)


def _original(root: Path, found: Layout, variant: str) -> _Opened:
    main = root / found.weights["unet"][0]
    content = open_pickle(main)
    for key in ("unet", "null_embedding"):
        if key not in content:
            raise ConversionError(
                f"{main} has no {key!r} (it has {_names(content)}): it is not a "
                "Kandinsky 3 checkpoint."
            )
    unknown = content.keys() - {"unet", "null_embedding", "projections"}
    if unknown:
        raise ConversionError(f"{main} holds {_names(unknown)}, which is not known.")
    tensors = {
        "unet": unwrapped(flat(_mapping(content, "unet", main), main)),
        "movq": open_weights([root / found.weights["movq"][0]]),
    }
    if "projections" in content:
        layout = "original30"
        projection = unwrapped(flat(_mapping(content, "projections", main), main))
    elif "text_projection" in found.weights:
        layout = "original"
        projection = open_weights([root / found.weights["text_projection"][0]])
    else:
        raise ConversionError(
            f"{main} has no 'projections' (3.0), and there is no projection file of the variant "
            f"{variant} in the text encoder's folder (3.1)."
        )
    null = content["null_embedding"]
    if not isinstance(null, torch.Tensor):
        raise ConversionError(f"{main}: null_embedding is a {type(null).__name__}, not a tensor.")
    tensors["text_projection"] = {**projection, **flat({"null_embedding": null}, main)}
    levels = len(
        {name.split(".")[2] for name in tensors["movq"] if name.startswith("encoder.down.")}
    )
    tables = {
        "text_projection": keys.table("text_projection", layout),
        "unet": keys.table("unet", "original"),
        "movq": keys.table("movq", "original", levels=levels),
    }
    infer = {"text_projection": inferred_projection, "unet": inferred_unet, "movq": inferred_movq}
    if "text_encoder" in found.weights:
        tensors["text_encoder"] = open_weights(root / f for f in found.weights["text_encoder"])
        tables["text_encoder"] = keys.table("text_encoder")
        infer["text_encoder"] = inferred_text_encoder
    parts = {name: infer[name](Shapes(tables[name], shapes(tensors[name]))) for name in infer}
    if "text_encoder" in found.configs:
        file = root / found.configs["text_encoder"]
        parts["text_encoder"] = text_encoder_config(_json(file), str(file))
    parts |= {"conditioning": "original", "sampler": original_sampler(layout, variant)}
    parts = _with_own_settings(parts, root, found)
    return _Opened(layout, tensors, tables, parts)


def _with_own_settings(parts: dict, root: Path, found: Layout) -> dict:
    if "k3jax" not in found.configs:
        return parts
    file = root / found.configs["k3jax"]
    return with_own_settings(parts, _json(file), str(file))


def _split(table: Table, tensors: Tensors) -> tuple[Tensors, Tensors]:
    """The tensors that the table knows, and the others."""
    mine = {name: tensor for name, tensor in tensors.items() if table.from_torch(name)}
    return mine, {name: tensor for name, tensor in tensors.items() if name not in mine}


def _names(keys) -> str:
    return ", ".join(sorted(str(key)[:80] for key in list(keys)[:20]))


def _mapping(content, key, file):
    if not isinstance(content[key], Mapping):
        raise ConversionError(
            f"{file}: {key!r} is a {type(content[key]).__name__}, not a state dict."
        )
    return content[key]


def _json(file: Path) -> dict:
    try:
        return read_object(file)
    except ValueError as error:
        raise ConversionError(f"{error}: fetch it again.") from None
