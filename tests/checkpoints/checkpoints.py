# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints for the tests: two components, an encoder of three stacked layers."""

import os

import numpy as np
from flax import nnx

from k3jax.checkpoints.writer import CheckpointWriter
from k3jax.config import ModelConfig, TextEncoderConfig, TextProjectionConfig, UNetConfig
from k3jax.model import abstract


CONFIG = ModelConfig(
    TextEncoderConfig(vocab_size=24, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2),
    TextProjectionConfig(d_model=16, cross_attention_dim=8),
    UNetConfig(cross_attention_dim=8),
)


def disk_arrays(component, config=CONFIG, dtype=np.float32, seed=0):
    """Random arrays under a component's on-disk names."""
    rng, arrays = np.random.default_rng(seed), {}
    for path, variable in nnx.to_flat_state(nnx.state(abstract.abstract_module(component, config))):
        name, shape = ".".join(map(str, path)), variable.get_value().shape
        stacked = component == "text_encoder" and name.startswith("layers.")
        for layer in range(shape[0]) if stacked else (None,):
            key = name if layer is None else name.replace("layers.", f"layers.{layer}.", 1)
            arrays[key] = rng.normal(size=shape[stacked:]).astype(dtype)
    return arrays


def write(
    path, encoder=None, projection=None, share=None, config=CONFIG, dtype="float32", **kwargs
):
    """A checkpoint of two components; the encoder may be another checkpoint's."""
    with CheckpointWriter(path, **kwargs) as writer:
        if share is None:
            arrays = disk_arrays("text_encoder") if encoder is None else encoder
            for name, array in arrays.items():
                writer.write("text_encoder", {name: array})
        else:
            writer.share("text_encoder", share)
        writer.write(
            "text_projection", disk_arrays("text_projection") if projection is None else projection
        )
        writer.commit(config, {"path": "somewhere"}, dtype)
    return path


def module_arrays(module):
    flat = nnx.to_flat_state(nnx.state(module))
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}


def stacked(arrays):
    """On-disk arrays as the module holds them."""
    result = {name: a for name, a in arrays.items() if not name.startswith("layers.")}
    rests = {name.split(".", 2)[2] for name in arrays if name.startswith("layers.")}
    for rest in rests:
        layers = range(CONFIG.text_encoder.num_layers)
        result[f"layers.{rest}"] = np.stack([arrays[f"layers.{n}.{rest}"] for n in layers])
    return result


def largest_file(path, component):
    files = [f for f in (path / component).rglob("*") if f.is_file()]
    return max(files, key=lambda f: f.stat().st_size)


def flip(path, component):
    file = largest_file(path, component)
    with file.open("r+b") as f:
        f.seek(file.stat().st_size // 2)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 16]))
    return file


def one_sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text and text.endswith(".")
    return text
