# SPDX-License-Identifier: Apache-2.0
"""README.md of a data set, as a data card of the Hugging Face hub: YAML, then text for people.

It is a function of manifest.json without its places. `load_dataset` reads from it where the files
are. Form: https://huggingface.co/docs/hub/datasets-cards
"""

import json

from k3jax.checkpoints.cards import LIMITS, front_matter
from k3jax.synthesis.metadata import columns_of
from k3jax.synthesis.run_manifest import DATA, ENDINGS, RunManifest
from k3jax.synthesis.store import Store


CARD = "README.md"
LOADERS = {
    "webdataset": 'datasets.load_dataset("webdataset", data_files="data/*.tar")',
    "parquet": 'datasets.load_dataset("parquet", data_files="data/*.parquet")',
    "files": 'datasets.load_dataset("imagefolder", data_dir="data")',
}
HUB_FORMATS = {"webdataset": "webdataset", "parquet": "parquet", "files": "imagefolder"}
TASKS = {"text": "text to image", "image": "image to image", "inpaint": "inpainting"}
SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
"""The bounds of the hub's categories of size: powers of ten from a thousand."""


def write_card(store: Store, manifest: RunManifest) -> None:
    """Writes README.md unless there is one, which people may have edited."""
    store.create_new(CARD, data_card(manifest).encode())


def data_card(manifest: RunManifest) -> str:
    settings, layout, sampler = manifest.settings, manifest.layout, manifest.settings.sampler
    prompts, weights = manifest.prompts, manifest.weights
    lora = f", LoRA `{weights['lora']}` at {weights['lora_scale']:g}" if "lora" in weights else ""
    options = {k: v for k, v in settings.call_options.items() if v is not None}
    call = "".join(f"; {name} {json.dumps(value)}" for name, value in options.items())
    int8 = " and the text encoder's in int8" if settings.int8_text_encoder else ""
    quality = "lossless" if settings.quality is None else f"quality {settings.quality}"
    installed = {n: version for n, version in manifest.versions.items() if version != "none"}
    versions = ", ".join(f"{name} {version}" for name, version in installed.items())
    return f"""{front_matter(_top(manifest))}
# {layout.samples:,} images by k3jax

Computed by a model from {_count(prompts["rows"], "prompt")} with
{_count(settings.images_per_prompt, "image")} each.

## What is here

{_count(layout.shards, "shard")} of {settings.samples_per_shard:,} samples in the format
{settings.format} ({settings.image_format}, {quality}).

- `data/`: the shards. `{LOADERS[settings.format]}`
- `metadata/`: a table for each shard, also of samples that failed and so are not in `data/`.
- `manifest.json`: everything that the images are a function of.

`datasets.load_dataset(FOLDER)` reads the images, and
`datasets.load_dataset("parquet", data_files="metadata/*.parquet")` the metadata:

{_columns(manifest)}

## How the images were computed

- Weights: fingerprint `{weights["fingerprint"]}`{lora}.
- Prompts: {_prompt_files(prompts)}.
- Tasks: {", ".join(TASKS[task] for task in prompts["tasks"])}.
- Unless a prompt says otherwise: {settings.width}x{settings.height} pixels, guidance
  {sampler.guidance_scale:g}; {sampler.num_inference_steps} steps of {sampler.name}{call}.
- Run seed {settings.seed}: each sample has its own seed, a hash of the run seed and its id.
- Computed in {settings.dtype}, with weights in {settings.param_dtype}{int8}.
- With: {versions}.

`k3jax verify` audits this folder, `k3jax regenerate` computes one of its images again, and
`k3jax gallery` shows them.

## Limits

{LIMITS}- Nobody has looked at the images, and none was removed for what it shows.

## Licence

k3jax claims no rights in these images. Whoever publishes them sets `license` above, as the licences
of the weights and of the prompts allow.
"""


def _columns(manifest: RunManifest) -> str:
    rows = [(c.name, c.type, c.description) for c in columns_of(manifest)]
    lines = [f"| `{name}` | {type} | {text} |" for name, type, text in rows]
    return "\n".join(["| column | type | |", "|---|---|---|", *lines])


def _top(manifest: RunManifest) -> dict:
    settings, layout = manifest.settings, manifest.layout
    ending = ENDINGS[settings.format]
    files = f"{DATA}/*{ending}" if ending else f"{DATA}/*/*"
    task = "text-to-image" if "text" in manifest.prompts["tasks"] else "image-to-image"
    return {
        "license": "unknown",
        "task_categories": [task],
        "size_categories": [_size(layout.samples)],
        "tags": ["synthetic", "kandinsky-3", HUB_FORMATS[settings.format]],
        # metadata/ is no second config: a folder has one kind of reader.
        "configs": [{"config_name": "default", "data_files": files}],
    }


def _prompt_files(prompts) -> str:
    """By their hashes, because names of files belong to one machine."""
    files = [f"{_count(f['rows'], 'row')} with sha256 `{f['sha256']}`" for f in prompts["files"]]
    more = len(files) - 8
    return "; ".join(files[:8]) + (f"; and {_count(more, 'file')} more" if more > 0 else "")


def _size(samples: int) -> str:
    """The hub's category: 'n<1K', '1K<n<10K', ..."""
    position = next((k for k in range(len(SIZES)) if samples < 10 ** (k + 3)), len(SIZES))
    if position == 0:
        return f"n<{SIZES[0]}"
    below = SIZES[position - 1]
    return f"n>{below}" if position == len(SIZES) else f"{below}<n<{SIZES[position]}"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
