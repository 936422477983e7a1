# SPDX-License-Identifier: Apache-2.0
"""A small checkpoint with random weights: all components, the original conditioning."""

import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from k3jax.checkpoints.restore import save_module
from k3jax.checkpoints.writer import CheckpointWriter
from k3jax.config import (
    COMPONENTS,
    ModelConfig,
    MoVQConfig,
    SamplerConfig,
    TextEncoderConfig,
    TextProjectionConfig,
    UNetConfig,
)
from k3jax.model.abstract import abstract_module


SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
VOCAB_SIZE = len(SPECIAL_TOKENS) + 256
MODEL = ModelConfig(
    TextEncoderConfig(
        vocab_size=VOCAB_SIZE, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4
    ),
    TextProjectionConfig(d_model=64, cross_attention_dim=64),
    UNetConfig(
        init_channels=32,
        block_out_channels=(32, 64),
        layers_per_block=2,
        time_embedding_dim=128,
        cross_attention_dim=64,
        attention_head_dim=16,
        groups=16,
    ),
    MoVQConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1),
    sample_size=128,
    sampler=SamplerConfig(num_inference_steps=25),
)


def write_random_checkpoint(path: str | Path, model: ModelConfig = MODEL, seed: int = 0) -> None:
    """Writes a checkpoint; the same bytes of weights for the same seed."""
    with tempfile.TemporaryDirectory() as folder, CheckpointWriter(path) as writer:
        write_byte_tokenizer(folder)
        writer.add_tokenizer(folder)
        for number, component in enumerate(COMPONENTS):
            module = random_module(component, model, np.random.default_rng([seed, number]))
            save_module(writer, component, module)
        source = {"layout": "random", "note": "random weights", "seed": seed}
        writer.commit(model, source=source, dtype="float32")


def random_module(component: str, config: ModelConfig, rng: np.random.Generator) -> nnx.Module:
    """A component with random weights that keep the size of activations.

    Drawn in numpy leaf by leaf: compiling an initialiser of a thousand layers takes minutes.
    """
    module = abstract_module(component, config)
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        shape, name = variable.get_value().shape, path[-1]
        values = rng.standard_normal(shape, np.float32)
        if name == "kernel":
            # Convolutions (h, w, in, out) read h w in values; linear layers, also stacked, read in.
            values *= float(np.prod(shape[:-1]) if len(shape) == 4 else shape[-2]) ** -0.5
        elif name == "scale" or "conv_y" in path:
            values = 1 + 0.1 * values
        elif name == "bias":
            values *= 0.1
        leaf = module
        for part in path:
            leaf = leaf[part] if isinstance(part, int) else getattr(leaf, part)
        leaf.set_value(jnp.asarray(values))
    return jax.device_put(module, jax.local_devices()[0])


def write_byte_tokenizer(folder: str | Path) -> None:
    """A tokenizer.json with one token per byte of UTF-8, so that it needs no training."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocab["</s>"])]
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(Path(folder) / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 128,
    }
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
