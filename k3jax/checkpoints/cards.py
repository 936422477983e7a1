# SPDX-License-Identifier: Apache-2.0
"""README.md of a checkpoint, as a model card of the Hugging Face hub: YAML, then text for people.

Everything in it follows from what it describes: the same weights give the same card on any day, on
any machine. It is no part of what the manifest protects, since people go on writing it.
Form: https://huggingface.co/docs/hub/model-cards
"""

import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

from k3jax.config import ModelConfig


RELEASED = (
    "ai-forever/Kandinsky3.0",
    "ai-forever/Kandinsky3.1",
    "kandinsky-community/kandinsky-3",
)
"""Hub ids of the weights that were released under Apache-2.0."""
PACKAGES = ("k3jax", "jax", "flax", "orbax-checkpoint")

LIMITS = """\
- What it shows is made up. It can be false, and it carries the biases of the pictures and captions
  that the weights were trained on (Kandinsky 3: image-text pairs from the internet, see
  [arXiv:2312.03511](https://arxiv.org/abs/2312.03511)): of people above all.
- Counting, how things stand to each other, hands and written words often go wrong.
- k3jax has no safety filter and puts no watermark into images: whoever shows them to others decides
  what is fit to be shown.
"""
LICENCES = {
    "apache-2.0": "The released weights of Kandinsky 3 are under Apache-2.0, and so are these.",
    "unknown": "These weights do not come straight from a release that k3jax knows. Those of "
    "Kandinsky 3 are under Apache-2.0; whoever publishes these sets `license` above.",
}


def front_matter(values: Mapping[str, Any]) -> str:
    """The YAML block at the top of a card; None is left out. (JSON values are YAML.)"""
    lines = [
        f"{key}: {json.dumps(value, ensure_ascii=False)}"
        for key, value in values.items()
        if value is not None
    ]
    return "\n".join(["---", *lines, "---", ""])


def model_card(
    config: ModelConfig,
    source: Mapping[str, Any],
    dtype: str,
    fingerprint: str,
    layout: str | None = None,
) -> str:
    """The card of a checkpoint.

    Args:
        source: where the weights come from, as a checkpoint's config.json has it.
        dtype, fingerprint: of the weights.
        layout: of the files beside the card: `diffusers` or `original`; None: those of k3jax.
    """
    repository = next((repo for repo in _repositories(source) if repo in RELEASED), None)
    inpaints = config.unet.in_channels != config.movq.latent_channels
    tags = ["kandinsky-3", "inpainting" if inpaints else None, "jax" if layout is None else None]
    # What was trained or merged into the released weights may have terms of its own.
    released = repository is not None and not _is_changed(source)
    licence = "apache-2.0" if released else "unknown"
    sampler = config.sampler
    top = {
        "license": licence,
        "pipeline_tag": "image-to-image" if inpaints else "text-to-image",
        "library_name": {None: "k3jax", "diffusers": "diffusers"}.get(layout),
        "base_model": repository,
        "base_model_relation": "finetune" if repository and _is_changed(source) else None,
        "tags": [tag for tag in tags if tag],
    }
    name = "inpainting" if inpaints else "text to image"
    return f"""{front_matter(top)}
# Kandinsky 3 ({name}), {"for k3jax" if layout is None else f"as files of PyTorch ({layout})"}

A latent diffusion model of the Kandinsky 3 architecture: text encoder, U-Net, MoVQ decoder.

## How it was made

- From: {_origin(source)}.
- Weights: fingerprint `{fingerprint}` (equal for equal arrays, whoever converted them), mostly
  {dtype}.
- Defaults: {config.sample_size}x{config.sample_size} pixels, sampler {sampler.name},
  {sampler.num_inference_steps} steps, guidance {sampler.guidance_scale:g};
  conditioning {config.conditioning}.
- With: {", ".join(f"{package} {version(package)}" for package in PACKAGES)}.

## Use

{_use(layout, inpaints)}

## Limits

{LIMITS}
## Licence

{LICENCES[licence]}
"""


def _use(layout: str | None, inpaints: bool) -> str:
    if layout == "diffusers":
        return '`diffusers.Kandinsky3Pipeline.from_pretrained("FOLDER")`'
    if layout is not None:
        return "The code of https://github.com/ai-forever/Kandinsky-3 loads these files."
    words = "inpaint" if inpaints else "generate"
    files = " --image scene.png --mask mask.png" if inpaints else ""
    return (
        f'`k3jax {words} "a corgi"{files} --checkpoint FOLDER`; all settings are in `config.json`.'
    )


def _origin(source: Mapping[str, Any]) -> str:
    """'converted from ai-forever/Kandinsky3.1 (layout original, variant base; digest ...)'."""
    if source.get("layout") == "k3jax train":
        base = source.get("base", {}).get("source")
        before = f", starting as the weights {_origin(base)}" if base else ""
        return f"trained with k3jax ({source.get('task')}, {source.get('steps')} steps){before}"
    # A local folder says nothing to others, and may say too much of its owner.
    place = source.get("repo", "local files")
    facts = [f"{key} {source[key]}" for key in ("layout", "variant") if key in source]
    if "sha256" in source:
        facts.append(f"digest of the tensors `{source['sha256']}`")
    if "lora" in source:
        facts.append(f"with a LoRA merged into the U-Net at scale {source['lora'].get('scale')}")
    return f"converted from {place}" + (f" ({', '.join(facts)})" if facts else "")


def _is_changed(source: Mapping[str, Any]) -> bool:
    return "lora" in source or source.get("layout") == "k3jax train"


def _repositories(source: Mapping[str, Any]) -> Iterator[str]:
    """Of the weights, and of those that they started as."""
    if "repo" in source:
        yield source["repo"]
    base = source.get("base")
    if isinstance(base, Mapping) and isinstance(base.get("source"), Mapping):
        yield from _repositories(base["source"])
