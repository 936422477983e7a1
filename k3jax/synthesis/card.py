# SPDX-License-Identifier: Apache-2.0
"""README.md of a data set: where `datasets.load_dataset` looks for its files, and what they are."""

from k3jax.synthesis.layout import CARD, DATA, ENDINGS
from k3jax.synthesis.run_manifest import Manifest
from k3jax.synthesis.storage import Store


LOADERS = {
    "webdataset": 'datasets.load_dataset("webdataset", data_files="data/*.tar")',
    "parquet": 'datasets.load_dataset("parquet", data_files="data/*.parquet")',
    "files": 'datasets.load_dataset("imagefolder", data_dir="data")',
}


def write_card(store: Store, manifest: Manifest) -> None:
    """Writes README.md unless there is one."""
    settings, layout = manifest.settings, manifest.layout
    files = f"{DATA}/*{ENDINGS[settings.format]}" if ENDINGS[settings.format] else f"{DATA}/*/*"
    sampler = settings.sampler
    text = f"""---
configs:
- config_name: default
  data_files: "{files}"
---
# {layout.samples:,} images by k3jax

{layout.shards:,} shards of {settings.samples_per_shard:,} samples in the format {settings.format}
({settings.image_format}), {settings.width}x{settings.height} unless a prompt says otherwise;
sampler {sampler.name}, {sampler.num_inference_steps} steps, guidance {sampler.guidance_scale:g},
run seed {settings.seed}, weights {manifest.weights["fingerprint"][:16]}.

- `data/`: the shards. `{LOADERS[settings.format]}`
- `metadata/`: for each shard what was asked for and what came of it, failed samples included.
- `manifest.json`: all that the images are a function of.

`k3jax verify` audits this folder, `k3jax regenerate` makes one of its images again, and
`k3jax gallery` shows them.
"""
    store.create_new(CARD, text.encode())
