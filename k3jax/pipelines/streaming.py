# SPDX-License-Identifier: Apache-2.0
"""The text encoder where it does not fit: layer after layer from its checkpoint.

Flan-UL2 takes 17.4 GB in bfloat16, more than a chip of 16 GB holds and more than many hosts have.
But a prompt needs one layer at a time (0.54 GB). So all prompts go through the first layer, then
through the second, and a layer is read while the one before it computes. The embeddings are those
of the whole encoder, to the rounding of the compiler. It costs one reading of the weights for each
call, however many prompts that has: encode all of them together. (int8 weights, the other way to
save memory, are quicker and change the embeddings: `k3jax.model.int8`.)
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from k3jax.checkpoints.format import Checkpoint
from k3jax.checkpoints.manifest import check_component
from k3jax.checkpoints.restore import restore_layers
from k3jax.config import AttentionForm
from k3jax.files import is_local
from k3jax.model.attention import check_attention_form
from k3jax.model.text_encoder import EncoderLayer, TextEncoder, through_layers
from k3jax.pipelines.programs import encode_text
from k3jax.sharding import batch_sharding, fetch, place


ACTIVATION_BYTES = 2**30
"""Of the prompts that go through a layer together: 341 prompts of 128 tokens at full size."""

Batch = tuple[np.ndarray, np.ndarray]
"""Token ids and mask, (b, n) each."""


class StreamedTextEncoder:
    """Takes the place of a pipeline's `TextEncoder`, and holds none of its layers.

    Attributes:
        dtype: of the computation.
        param_dtype: of the weights.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        mesh: Mesh,
        param_dtype,
        dtype,
        verify: bool | None = None,
        attention: AttentionForm = "auto",
    ):
        """
        Raises:
            CheckpointError: files that are missing or damaged; see `checkpoints.restore`.
            ValueError: the mesh spans several hosts, or attention that its devices do not have.
        """
        check_attention_form(attention, mesh.devices.flat[0].platform, dtype)
        if not batch_sharding(mesh).is_fully_addressable:
            raise ValueError(
                "the text encoder is streamed on one host only: over several, split it with "
                "encoder_mesh='fsdp=-1'."
            )
        folder = checkpoint.component_path("text_encoder")
        hashed = is_local(folder) if verify is None else verify
        check_component(folder.parent, "text_encoder", hashed=hashed, share=(0, 1))
        self.dtype, self.param_dtype = dtype, param_dtype
        self._checkpoint, self._mesh, self._attention = checkpoint, mesh, attention
        self._around = self._read(range(0))

    def encode(self, batches: Sequence[Batch]) -> Iterator[np.ndarray]:
        """Embeddings (b, n, d_model) of each batch of token ids and mask."""
        for group in self._groups(batches):
            yield from self._encode_together(group)

    def _encode_together(self, batches: Sequence[Batch]) -> list[np.ndarray]:
        texts = place(list(batches), batch_sharding(self._mesh))
        states = [_begin(self._around, *text) for text in texts]
        count = self._checkpoint.config.text_encoder.num_layers
        with ThreadPoolExecutor(1) as reader:
            following = reader.submit(self._read, range(1))
            for number in range(count):
                layers = following.result().layers
                if number + 1 < count:
                    following = reader.submit(self._read, range(number + 1, number + 2))
                states = [_through(layers, *state) for state in states]
                jax.block_until_ready(states)  # at most two layers are in memory
        return [fetch(_finish(self._around, x)) for x, _ in states]

    def _read(self, layers: range) -> TextEncoder:
        return restore_layers(
            self._checkpoint,
            layers,
            mesh=self._mesh,
            param_dtype=self.param_dtype,
            dtype=self.dtype,
            attention=self._attention,
        )

    def _groups(self, batches: Sequence[Batch]) -> Iterator[list[Batch]]:
        config = self._checkpoint.config.text_encoder
        group, size = [], 0
        for batch in batches:
            group.append(batch)
            rows, tokens = batch[0].shape
            size += 4 * rows * tokens * (config.d_model + config.num_heads * tokens)
            if size >= ACTIVATION_BYTES:
                yield group
                group, size = [], 0
        if group:
            yield group


def encode_batches(
    encoder: TextEncoder | StreamedTextEncoder, batches: Sequence[Batch], mesh: Mesh
) -> Iterator[np.ndarray]:
    """Embeddings (b, n, d_model) of each batch; an encoder in memory is on `mesh`."""
    if isinstance(encoder, StreamedTextEncoder):
        yield from encoder.encode(batches)
        return
    for batch in batches:
        ids, mask = place(batch, batch_sharding(mesh))
        yield fetch(encode_text(encoder, ids, mask))


@jax.jit
def _begin(encoder: TextEncoder, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    return encoder.embed_tokens(ids), encoder.bias(mask)


@jax.jit
def _through(layers: EncoderLayer, x: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    return through_layers(layers, x, bias), bias


@jax.jit
def _finish(encoder: nnx.Module, x: jax.Array) -> jax.Array:
    return encoder.final_norm(x)
