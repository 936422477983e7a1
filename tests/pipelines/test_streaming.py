# SPDX-License-Identifier: Apache-2.0
"""The text encoder layer by layer from its checkpoint: the same embeddings, in a part of
the memory."""

import contextlib
import io
import pathlib
import weakref

import jax
import numpy as np
import pytest
from flax import nnx

from k3jax import Kandinsky3Pipeline
from k3jax.checkpoints.format import read_checkpoint
from k3jax.checkpoints.restore import restore
from k3jax.cli.main import main
from k3jax.pipelines import streaming
from k3jax.pipelines.programs import encode_text
from k3jax.pipelines.streaming import StreamedTextEncoder
from k3jax.sharding import batch_sharding, make_mesh


PROMPTS = [
    "a red circle",
    "two blue stars on a white background",
    "a pink ring above a green cross",
]


def texts(batch: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(3, 400, (batch, 16)), np.arange(16) < rng.integers(2, 17, (batch, 1))


@pytest.mark.parametrize(
    "spec", [pytest.param("data=8", marks=pytest.mark.slow), "data=2,fsdp=2,tensor=2"]
)
def test_the_same_embeddings(spec, monkeypatch):
    mesh = make_mesh(spec)
    dtypes = dict(mesh=mesh, param_dtype="float32", dtype="float32")
    checkpoint = read_checkpoint("tiny")
    streamed = StreamedTextEncoder(checkpoint, **dtypes)
    whole = restore(checkpoint, "text_encoder", **dtypes)
    # Each batch in a group of its own, and all in one.
    batches = [texts(8, seed) for seed in range(3)]
    together = list(streamed.encode(batches))
    monkeypatch.setattr(streaming, "ACTIVATION_BYTES", 1)
    apart = list(streamed.encode(iter(batches)))
    for text, one, other in zip(batches, together, apart, strict=True):
        expected = np.asarray(encode_text(whole, *jax.device_put(text, batch_sharding(mesh))))
        np.testing.assert_allclose(one[text[1]], expected[text[1]], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(one, other)


def test_two_layers_at_once(monkeypatch):
    mesh = make_mesh("data=8")
    streamed = StreamedTextEncoder(
        read_checkpoint("tiny"), mesh=mesh, param_dtype="float32", dtype="float32"
    )
    read, kernels, most, order = streamed._read, [], 0, []

    def watched(layers):
        nonlocal most
        module = read(layers)
        kernel = module.layers.mlp.wo.kernel.get_value()
        assert kernel.shape[0] == 1
        # The weights of other components of the module stay on disk.
        assert isinstance(module.embed_tokens.embedding.get_value(), jax.ShapeDtypeStruct)
        kernels.append(weakref.ref(kernel))
        most = max(most, sum(one() is not None for one in kernels))
        order.extend(layers)
        return module

    monkeypatch.setattr(streamed, "_read", watched)
    list(streamed.encode([texts(8)]))
    assert order == [0, 1, 2, 3]
    assert most <= 2
    around = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(streamed._around)))
    whole = restore("tiny", "text_encoder", mesh=mesh)
    assert around < sum(leaf.size for leaf in jax.tree.leaves(nnx.state(whole))) / 4


@pytest.fixture(scope="module")
def pipes():
    one = make_mesh("data=1", jax.devices()[:1])
    kwargs = dict(mesh=one, dtype="float32", batch_size=8)
    whole = Kandinsky3Pipeline.from_pretrained("tiny", **kwargs)
    return whole, Kandinsky3Pipeline.from_pretrained("tiny", stream_text_encoder=True, **kwargs)


def test_in_a_pipeline(pipes):
    whole, streamed = (pipe.encode_prompt(3 * PROMPTS) for pipe in pipes)
    assert streamed.embeds.shape[0] == 9  # a batch and a padded one
    mask = whole.attention_mask
    np.testing.assert_allclose(streamed.embeds[mask], whole.embeds[mask], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(streamed.lengths, whole.lengths)


def test_a_pipeline_made_of_another_streams_too(pipes):
    _, streamed = pipes
    assert Kandinsky3Pipeline.from_pipe(streamed).text_encoder is streamed.text_encoder
    made = Kandinsky3Pipeline.from_pipe(streamed, "tiny")
    assert isinstance(made.text_encoder, StreamedTextEncoder)


@pytest.mark.slow
def test_on_the_command_line(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    where = ["--batch-size", "8", "--steps", "2", "--stream-text-encoder"]
    made = str(tmp_path / "made")
    data_set = str(tmp_path / "data set")
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["generate", PROMPTS[0], "--output", made, *where]) == 0
        assert main(["synthesize", str(prompts), data_set, *where]) == 0
        assert main(["verify", data_set]) == 0
        # Where the encoder was during the run is no part of the data set: it goes on without.
        assert main(["synthesize", str(prompts), data_set, *where[:-1]]) == 0
        shard = next((pathlib.Path(data_set) / "data").glob("*.tar"))
        content = shard.read_bytes()
        shard.write_bytes(content[:-600])
        assert main(["verify", data_set, "--repair", "--stream-text-encoder"]) == 0
        assert shard.read_bytes() == content
        refused = ["synthesize", str(prompts), str(tmp_path / "no"), *where, "--int8-text-encoder"]
        assert main(refused) != 0
    assert len(list((tmp_path / "made").glob("*.png"))) == 1
    assert not (tmp_path / "no").exists()
