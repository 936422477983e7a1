# SPDX-License-Identifier: Apache-2.0
"""Tiny PyTorch checkpoints on disk, in every layout that is converted.

PyTorch and diffusers are imported by the functions that need them; a dtype of None is float32.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from k3jax.convert import keys

import tiny


if TYPE_CHECKING:
    import torch


UNET = tiny.SHALLOW_UNET  # half the tensors
ARCHITECTURE = {
    "unet": {"attention_head_dim": UNET.attention_head_dim, "groups": UNET.groups},
    "movq": {"norm_num_groups": tiny.MOVQ.norm_num_groups},
}
"""What the shapes of the tiny models do not tell: the original layout has no file that says it."""

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": True,
    "thresholding": False,
    "steps_offset": 1,
}

TEXT = """A cute corgi lives in a house made out of sushi. A red cat sleeps on the windowsill.
Mountains at dawn, oil on canvas. A lighthouse in a storm, detailed photograph, 35 mm film.
The quick brown fox jumps over the lazy dog. Portrait of an old sailor with a long white beard.
Blueprint of a flying machine, ink on paper. Low quality, blurred, cropped, bad anatomy.
"""


@functools.cache
def state_dicts() -> dict[str, dict[str, torch.Tensor]]:
    """float32 state dicts of the tiny models in diffusers' names: text_encoder, unet, movq."""
    encoder = dict(tiny.torch_text_encoder().state_dict())
    encoder.pop("encoder.embed_tokens.weight", None)  # an alias of shared.weight
    return {
        "text_encoder": encoder,
        "unet": dict(tiny.torch_unet(UNET).state_dict()),
        "movq": dict(tiny.torch_movq().state_dict()),
    }


def cast(
    state: Mapping[str, torch.Tensor], dtype: torch.dtype | None, keep=()
) -> dict[str, torch.Tensor]:
    """A state dict in another dtype; names that end in one of `keep` stay in float32."""
    return {
        name: (t if keep and name.endswith(keep) else t.to(dtype)).contiguous().clone()
        for name, t in state.items()
    }


@functools.cache
def spiece_model() -> bytes:
    """A small SentencePiece vocabulary with T5's special ids."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        vocab_size=80,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def write_spiece(folder: Path) -> None:
    """A tokenizer folder as published: nothing but spiece.model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(spiece_model())


def real_tokenizer() -> Path | None:
    """The folder with the real T5 vocabulary, where there is one."""
    beside = Path(__file__).parents[2] / "shared" / "data" / "t5-tokenizer"
    folder = Path(os.environ.get("K3JAX_T5_TOKENIZER", beside))
    return folder if (folder / "spiece.model").exists() else None


def write_pipeline(folder: Path, dtype: torch.dtype | None = None, **kwargs) -> Path:
    """What diffusers' own save_pretrained writes.

    Args:
        kwargs: for save_pretrained, e.g. variant="fp16", safe_serialization=False.
    """
    from diffusers import DDPMScheduler, Kandinsky3Pipeline
    from transformers import T5Tokenizer

    write_spiece(folder / "spiece")
    pipeline = Kandinsky3Pipeline(
        tokenizer=T5Tokenizer.from_pretrained(folder / "spiece"),
        text_encoder=tiny.torch_text_encoder().to(dtype),
        unet=tiny.torch_unet(UNET).to(dtype),
        scheduler=DDPMScheduler(**SCHEDULER),
        movq=tiny.torch_movq().to(dtype),
    )
    shutil.rmtree(folder / "spiece")
    pipeline.save_pretrained(folder, **kwargs)
    return folder


def write_diffusers(
    folder: Path,
    dtype: torch.dtype | None = None,
    *,
    variant: str | None = None,
    shards: int = 1,
    float32_wo: bool = False,
    pickles: bool = False,
    changes: Mapping[str, Mapping[str, torch.Tensor | None]] | None = None,
) -> dict[str, dict[str, torch.Tensor]]:
    """The diffusers layout as it is published.

    Args:
        variant: `fp16` for files named *.fp16.*.
        shards: of the text encoder.
        float32_wo: `wo` of the text encoder stays in float32, as transformers keeps it in fp16.
        pickles: .bin instead of .safetensors.
        changes: component -> name -> tensor to be put in; None takes it away.

    Returns:
        Component -> the state dict that was written.
    """
    keep = ("wo.weight",) if float32_wo else ()
    states = {c: cast(s, dtype, keep) for c, s in state_dicts().items()}
    _change(states, changes)
    mark = f".{variant}" if variant else ""
    end = "bin" if pickles else "safetensors"
    for component, state in states.items():
        stem = "diffusion_pytorch_model"
        if component == "text_encoder":
            stem = "pytorch_model" if pickles else "model"
        count = shards if component == "text_encoder" else 1
        for index, part in enumerate(_parts(state, count)):
            shard = f"-{index + 1:05d}-of-{count:05d}" if count > 1 else ""
            save(part, folder / component / f"{stem}{mark}{shard}.{end}")
    _write_json(folder / "model_index.json", {"_class_name": "Kandinsky3Pipeline"})
    configs = {
        "unet": tiny.torch_unet(UNET).config,
        "movq": tiny.torch_movq().config,
        "text_encoder": tiny.torch_text_encoder().config.to_dict(),
    }
    for component, config in configs.items():
        _write_json(folder / component / "config.json", dict(config))
    _write_json(
        folder / "scheduler" / "scheduler_config.json",
        {"_class_name": "DDPMScheduler", "_diffusers_version": "0.24.0", **SCHEDULER},
    )
    write_spiece(folder / "tokenizer")
    return states


def original_state_dicts(dtype: torch.dtype | None = None, in_channels: int = 4):
    """Component -> state dict in the names of the original code, the projection on its own."""
    import torch

    states = {c: cast(s, dtype) for c, s in state_dicts().items()}
    projection = keys.table("text_projection")
    generator = torch.Generator().manual_seed(7)
    ours = {
        "unet": (keys.table("unet"), keys.table("unet", "original")),
        "movq": (
            keys.table("movq"),
            keys.table("movq", "original", levels=len(tiny.MOVQ.block_out_channels)),
        ),
    }
    result = {"text_encoder": states["text_encoder"]}
    for component, (theirs, original) in ours.items():
        result[component] = {}
        for name, tensor in states[component].items():
            for _, jax_name in theirs.from_torch(name):
                for rule, new_name in original.from_jax(jax_name):
                    # The original has 1x1 convolutions where diffusers has linear layers.
                    linear = theirs.from_torch(name)[0][0].jax_shape(tuple(tensor.shape))
                    result[component][new_name] = tensor.reshape(rule.torch_shape(linear))
    if in_channels != UNET.in_channels:
        shape = (UNET.init_channels, in_channels, 3, 3)
        result["unet"]["in_layer.weight"] = torch.randn(shape, generator=generator).to(dtype) * 0.1
    result["text_projection"] = {}
    for name, tensor in states["unet"].items():
        for _, jax_name in projection.from_torch(name):
            ((_, new_name),) = keys.table("text_projection", "original").from_jax(jax_name)
            result["text_projection"][new_name] = tensor
    width = tiny.PROJECTION.cross_attention_dim
    result["null_embedding"] = torch.randn(width, generator=generator).to(dtype)
    return result


def write_original(
    folder: Path,
    dtype: torch.dtype | None = None,
    *,
    version: str = "3.1",
    variant: str = "base",
    shards: int = 2,
    changes: Mapping[str, Mapping[str, torch.Tensor | None]] | None = None,
) -> dict[str, dict[str, torch.Tensor]]:
    """The original layout of 3.1 or 3.0; `variant` inpainting has 9 input channels.

    Returns:
        Component -> the state dict that was written; `null_embedding` is a tensor.
    """
    import torch

    states = original_state_dicts(dtype, in_channels=9 if variant == "inpainting" else 4)
    _change(states, changes)
    end = {"base": "", "flash": "_flash", "inpainting": "_inpainting"}[variant]
    content = {"unet": states["unet"], "null_embedding": states["null_embedding"]}
    encoder = folder / "flan_ul2_encoder"
    if version == "3.0":
        content["projections"] = {f"t5.{n}": t for n, t in states["text_projection"].items()}
    else:
        save(states["text_projection"], encoder / f"projection{end}.pt")
    save(content, folder / f"kandinsky3{end}.pt")
    save(states["movq"], folder / "movq.pt")
    weights = dict(states["text_encoder"])
    if version == "3.0":  # a whole T5, as google/flan-ul2 is
        weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
        weights["decoder.final_layer_norm.weight"] = torch.ones(tiny.TEXT_ENCODER.d_model)
        weights["lm_head.weight"] = torch.zeros(4, tiny.TEXT_ENCODER.d_model)
    names = {}
    for index, part in enumerate(_parts(weights, shards)):
        file = f"pytorch_model-{index + 1:05d}-of-{shards:05d}.bin"
        save(part, encoder / file)
        names |= dict.fromkeys(part, file)
    _write_json(encoder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": names})
    _write_json(encoder / "config.json", tiny.torch_text_encoder().config.to_dict())
    write_spiece(encoder)
    return states


def save(content, file: Path) -> None:
    """A (nested) state dict as .safetensors, or as what torch.save writes."""
    import torch
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".safetensors":
        save_file(content, file, metadata={"format": "pt"})
    else:
        torch.save(content, file)


def _change(states, changes):
    for component, tensors in (changes or {}).items():
        for name, tensor in tensors.items():
            if tensor is None:
                states[component].pop(name)
            else:
                states[component][name] = tensor.contiguous()


def _parts(state, count):
    names = list(state)
    return [{name: state[name] for name in names[i::count]} for i in range(count)]


def _write_json(file: Path, values) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, default=str))
