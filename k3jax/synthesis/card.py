# SPDX-License-Identifier: Apache-2.0
"""README.md of a data set, as a data card of the Hugging Face hub: YAML, then text for people.

It is a function of manifest.json alone, but for what that says of places. `load_dataset` reads from
it where the files are. Form: https://huggingface.co/docs/hub/datasets-cards
"""

from k3jax.checkpoints.cards import LIMITS, front_matter
from k3jax.synthesis.layout import CARD, DATA, ENDINGS
from k3jax.synthesis.run_manifest import Manifest
from k3jax.synthesis.store import Store


LOADERS = {
    "webdataset": 'datasets.load_dataset("webdataset", data_files="data/*.tar")',
    "parquet": 'datasets.load_dataset("parquet", data_files="data/*.parquet")',
    "files": 'datasets.load_dataset("imagefolder", data_dir="data")',
}
HUB_FORMATS = {"webdataset": "webdataset", "parquet": "parquet", "files": "imagefolder"}
TASKS = {"text": "text to image", "image": "image to image", "inpaint": "inpainting"}
SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
"""Where the hub parts its categories of size: powers of ten from a thousand."""


def write_card(store: Store, manifest: Manifest) -> None:
    """Writes README.md unless there is one: people go on writing it."""
    store.create_new(CARD, data_card(manifest).encode())


def data_card(manifest: Manifest) -> str:
    settings, layout, sampler = manifest.settings, manifest.layout, manifest.settings.sampler
    prompts, weights = manifest.prompts, manifest.weights
    lora = f", LoRA `{weights['lora']}` at {weights['lora_scale']:g}" if "lora" in weights else ""
    interval = settings.guidance_interval
    guided = f", in steps {interval[0]} to {interval[1]} only" if interval else ""
    int8 = " and the text encoder's in int8" if settings.int8_text_encoder else ""
    quality = "lossless" if settings.quality is None else f"quality {settings.quality}"
    installed = {n: version for n, version in manifest.versions.items() if version != "none"}
    versions = ", ".join(f"{name} {version}" for name, version in installed.items())
    return f"""{front_matter(_top(manifest))}
# {layout.samples:,} images by k3jax

Made by a model, none of them photographed or drawn, from {_count(prompts["rows"], "prompt")} with
{_count(settings.images_per_prompt, "image")} each.

## What is here

{_count(layout.shards, "shard")} of {settings.samples_per_shard:,} samples in the format
{settings.format} ({settings.image_format}, {quality}).

- `data/`: the shards. `{LOADERS[settings.format]}`
- `metadata/`: for each shard what was asked for and what came of it: id, prompts, seed, sampler,
  size, sha256, and the reason of each sample that failed and so is not in `data/`.
- `manifest.json`: all that the images are a function of.

`datasets.load_dataset(FOLDER)` reads the images, and
`datasets.load_dataset("parquet", data_files="metadata/*.parquet")` what was asked for.

## How it was made

- Weights: fingerprint `{weights["fingerprint"]}`{lora}.
- Prompts: {_prompt_files(prompts)}.
- Tasks: {", ".join(TASKS[task] for task in prompts["tasks"])}.
- Unless a prompt says otherwise: {settings.width}x{settings.height} pixels, guidance
  {sampler.guidance_scale:g}{guided}; {sampler.num_inference_steps} steps of {sampler.name}.
- Run seed {settings.seed}: each sample has a seed of its own, made from it and the sample's id.
- Computed in {settings.dtype}, with weights in {settings.param_dtype}{int8}.
- With: {versions}.

`k3jax verify` audits this folder, `k3jax regenerate` makes one of its images again, and
`k3jax gallery` shows them.

## Limits

{LIMITS}- No image was looked at by anybody, and none was left out for what it shows.

## Licence

k3jax claims no rights in these images. Whoever publishes them sets `license` above, with an eye on
the licences of the weights and of the prompts.
"""


def _top(manifest: Manifest) -> dict:
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
    """By their hashes: names of files are of the machine that had them."""
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
