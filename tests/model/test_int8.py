# SPDX-License-Identifier: Apache-2.0
"""int8 weights of the text encoder: how far they are from the real ones, and what they cost."""

import contextlib
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from k3jax import Kandinsky3Pipeline
from k3jax.checkpoints.restore import restore
from k3jax.cli.main import main
from k3jax.model.int8 import LARGEST, is_int8, quantize
from k3jax.sharding import make_mesh
from k3jax.training.scene_evaluation import unseen_captions


CAPTIONS = [caption for _, caption in unseen_captions(2)]


def weights(module) -> dict[str, jax.Array]:
    return {
        ".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(nnx.state(module))
    }


def relative(one, other) -> float:
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_weight_is_within_half_a_step(dtype):
    kernel = np.random.default_rng(0).normal(size=(3, 64, 48)) * np.geomspace(1e-4, 1e3, 48)
    kernel[:, :, 7] = 0
    kernel = jnp.asarray(kernel, dtype)
    steps, scale = quantize(kernel)
    assert (steps.dtype, scale.dtype, scale.shape) == (jnp.int8, jnp.bfloat16, (3, 1, 48))
    assert np.abs(np.asarray(steps, np.int32)).max() in (LARGEST - 1, LARGEST)
    scale = scale.astype(jnp.float32)
    error = jnp.abs(steps * scale - kernel.astype(jnp.float32))
    assert (error <= 0.5001 * scale).all()


@pytest.fixture(scope="module")
def exact():
    return restore("tiny", "text_encoder", dtype="float32", param_dtype="float32")


@pytest.mark.parametrize("spec", [None, "fsdp=2,tensor=4"])
def test_they_are_quantised_while_they_are_read(exact, spec):
    mesh = None if spec is None else make_mesh(spec)
    read = weights(
        restore(
            "tiny", "text_encoder", mesh=mesh, dtype="float32", param_dtype="float32", int8=True
        )
    )
    for name, kernel in weights(exact).items():
        if name.startswith("layers.") and name.endswith(".kernel"):
            steps, scale = quantize(kernel)
            np.testing.assert_array_equal(read.pop(name), steps)
            np.testing.assert_array_equal(read.pop(name.replace(".kernel", ".scale")), scale)
        else:
            np.testing.assert_array_equal(read.pop(name), kernel)
    assert not read
    if spec == "fsdp=2,tensor=4":
        int8 = restore("tiny", "text_encoder", mesh=mesh, int8=True)
        kernel = int8.layers.mlp.wi_0.kernel.get_value()
        assert kernel.addressable_shards[0].data.size * 8 == kernel.size


def layer(encoder, number: int):
    return jax.tree.map(lambda leaf: leaf[number], encoder.layers)


def test_the_error_of_each_layer(exact):
    """One layer at a time on the true input: what its own int8 weights cost."""
    int8 = restore("tiny", "text_encoder", dtype="float32", param_dtype="float32", int8=True)
    ids = jax.random.randint(jax.random.key(0), (4, 16), 3, exact.config.vocab_size)
    bias = exact.position_bias(16)
    x = exact.embed_tokens(ids)
    errors = []
    for number in range(exact.config.num_layers):
        one, other = (layer(module, number) for module in (exact, int8))
        after = one(x, bias)
        errors.append(relative(other(x, bias) - x, after - x))
        x = after
    print("\nint8 error of each layer's branch:", [f"{error:.2%}" for error in errors])
    assert max(errors) < 0.02


@pytest.fixture(scope="module")
def pipes():
    mesh = make_mesh("data=1", jax.devices()[:1])
    kwargs = dict(mesh=mesh, dtype="float32", batch_size=2)
    exact = Kandinsky3Pipeline.from_pretrained("tiny", **kwargs)
    return exact, Kandinsky3Pipeline.from_pretrained("tiny", int8_text_encoder=True, **kwargs)


@pytest.mark.slow
def test_the_error_in_the_image(pipes):
    exact, int8 = pipes
    assert is_int8(int8.text_encoder) and not is_int8(exact.text_encoder)
    call = dict(seed=3, num_inference_steps=10, progress_bar=False)
    one, other = (np.float32(pipe(CAPTIONS, **call).images) / 255 for pipe in pipes)
    off = np.abs(one - other).mean()
    embeds = [pipe.encode_prompt(CAPTIONS).embeds for pipe in pipes]
    print(f"\nint8: embeddings {relative(embeds[1], embeds[0]):.2%}, image {off * 255:.2f}/255")
    assert 0 < off < 4 / 255


def test_a_pipeline_made_of_another_stays_int8(pipes, tmp_path):
    _, int8 = pipes
    assert Kandinsky3Pipeline.from_pipe(int8).text_encoder is int8.text_encoder


def test_on_the_command_line(tmp_path, one_device):
    where = ["--output", str(tmp_path), "--batch-size", "2", "--dtype", "float32"]
    with contextlib.redirect_stdout(io.StringIO()):
        code = main(["generate", CAPTIONS[0], "--int8-text-encoder", "--steps", "2", *where])
    assert code == 0
    (path,) = tmp_path.glob("*.png")
    assert json.loads(Image.open(path).text["k3jax"])["int8_text_encoder"] is True
