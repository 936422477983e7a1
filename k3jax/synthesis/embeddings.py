# SPDX-License-Identifier: Apache-2.0
"""Text embeddings of a shard on the host, each text once, without its padding.

128 rows of 4096 float32 numbers are 2 MB a prompt; 20 tokens in bfloat16, from which the numbers
come, are 0.16 MB.
"""

from collections.abc import Sequence

import ml_dtypes
import numpy as np

from k3jax.model.context import PromptEmbeds


class Embeddings:
    """Embeddings by text. What comes out is bit for bit what went in, where it counts.

    Rows of padding come out as zeros: they are meaningless (see `TextEncoder`).
    """

    def __init__(self):
        self._rows: dict[str, np.ndarray] = {}
        self._lengths: dict[str, int] = {}
        self._shape = (0, 0)

    def add(self, texts: Sequence[str], embeds: PromptEmbeds) -> None:
        """Keeps the embeddings of some texts, float32 (b, n, d_model)."""
        self._shape = embeds.embeds.shape[1:]
        for row, text in enumerate(texts):
            tokens = int(embeds.attention_mask[row].sum())
            self._rows[text] = _narrowed(np.asarray(embeds.embeds[row, :tokens]))
            self._lengths[text] = int(embeds.lengths[row])

    def tokens(self, text: str) -> int:
        """Tokens of a text that the model sees."""
        return len(self._rows[text])

    def of(self, texts: Sequence[str]) -> PromptEmbeds:
        """Of these texts, one row each, as the pipeline takes them."""
        embeds = np.zeros((len(texts), *self._shape), np.float32)
        mask = np.zeros((len(texts), self._shape[0]), bool)
        for row, text in enumerate(texts):
            kept = self._rows[text]
            embeds[row, : len(kept)] = kept
            mask[row, : len(kept)] = True
        lengths = np.array([self._lengths[text] for text in texts], np.int32)
        return PromptEmbeds(embeds, mask, lengths)


def _narrowed(values: np.ndarray) -> np.ndarray:
    """A copy in bfloat16 where that loses nothing."""
    values = np.ascontiguousarray(values, np.float32)
    if (values.view(np.uint32) & 0xFFFF).any():
        return values.copy()
    return values.astype(ml_dtypes.bfloat16)
