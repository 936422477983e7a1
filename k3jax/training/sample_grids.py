# SPDX-License-Identifier: Apache-2.0
"""What the tasks need to show pictures: pipelines of a run's networks, prompts, grids."""

from collections.abc import Mapping, Sequence

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from k3jax.checkpoints.format import Checkpoint
from k3jax.checkpoints.restore import restore
from k3jax.config import COMPONENTS, ModelConfig
from k3jax.model.context import PromptEmbeds
from k3jax.model.tokenizer import Tokenizer
from k3jax.pipelines.pipeline import BasePipeline
from k3jax.sharding import data_parallelism


MAX_SHOWN = 16
"""Images of a batch that a grid shows at most."""


def pipeline_of(
    kind: type[BasePipeline],
    model: ModelConfig,
    components: Mapping[str, nnx.Module],
    mesh: Mesh,
    count: int,
    tokenizer: Tokenizer | None = None,
) -> BasePipeline:
    """A pipeline of some components, which samples `count` images in one batch."""
    splits = data_parallelism(mesh)
    components = {**dict.fromkeys(COMPONENTS), **components}
    return kind(model, tokenizer, components, mesh, batch_size=-(-count // splits) * splits)


def embed_prompts(
    checkpoint: Checkpoint, tokenizer: Tokenizer, prompts: Sequence[str], mesh: Mesh, dtype: str
) -> PromptEmbeds:
    """Embeddings on the host: afterwards the text encoder leaves the devices."""
    encoder = restore(checkpoint, "text_encoder", mesh=mesh, param_dtype=dtype, dtype=dtype)
    components = {"text_encoder": encoder}
    args = (checkpoint.config, components, mesh, len(prompts), tokenizer)
    return pipeline_of(BasePipeline, *args).encode_prompt(prompts)


def grid(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """uint8 (b, h, w, 3) -> one picture, about square unless `columns` says otherwise."""
    count, height, width, _ = images.shape
    columns = columns or int(np.ceil(count**0.5))
    rows = -(-count // columns)
    blank = np.full((rows * columns - count, height, width, 3), 255, np.uint8)
    cells = np.concatenate([images, blank]).reshape(rows, columns, height, width, 3)
    return cells.swapaxes(1, 2).reshape(rows * height, columns * width, 3)
