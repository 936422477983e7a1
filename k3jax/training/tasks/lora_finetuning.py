# SPDX-License-Identifier: Apache-2.0
"""LoRA: the weights that training begins with, and a checkpoint with those it ended with.

How a LoRA works is in `k3jax.model.lora`. A loss for `jax.grad` over the LoRA's weights alone:

    def loss(weights, unet, batch):
        return objective(lora.apply(unet, weights, lora.update_factor(config)), batch)
"""

import numpy as np
from flax import nnx

from k3jax.checkpoints.lora_files import load_lora, warn_of_another_base
from k3jax.checkpoints.restore import CheckpointWriter, iterate_leaves, read_checkpoint
from k3jax.config import LoraConfig
from k3jax.model import lora
from k3jax.model.abstract import abstract_module


def init_lora(
    unet: nnx.Module, config: LoraConfig, seed: int = 0
) -> dict[str, dict[str, np.ndarray]]:
    """A normal with variance 1 / in, B zero: a U-Net with it computes what it does without.

    Args:
        unet: with or without weights.

    Returns:
        float32 on the host; `k3jax.model.lora.lora_shardings` says where it goes on a mesh.

    Raises:
        ValueError: a rank or alpha that is not positive, or a target that is no linear layer.
    """
    if config.rank < 1:
        raise ValueError(f"the LoRA's rank is {config.rank}; it must be 1 or more.")
    if config.alpha is not None and not config.alpha > 0:
        raise ValueError(f"the LoRA's alpha is {config.alpha}; it must be more than 0.")
    rng = np.random.default_rng(seed)
    return {
        name: {
            "a": rng.standard_normal((rows, config.rank), np.float32) * np.float32(rows**-0.5),
            "b": np.zeros((config.rank, columns), np.float32),
        }
        for name, (rows, columns) in sorted(lora.target_shapes(unet, config).items())
    }


def merged_checkpoint(base, lora_folder, path, scale: float = 1.0, overwrite: bool = False) -> None:
    """Writes a checkpoint whose U-Net has the LoRA in its kernels, for `k3jax export`.

    Every other component is shared with the base, not copied. The sum W + A B is made in float32
    and rounded to the base's dtype on disk. Memory: one array besides what the writer holds.

    Args:
        base: the checkpoint that the LoRA was trained on; of another one it is a warning.
        scale: strength of the LoRA, 1 as it was trained.

    Raises:
        CheckpointError: a LoRA or checkpoint that cannot be read, a LoRA of another architecture,
            or a destination that exists.
    """
    base, loaded = read_checkpoint(base), load_lora(lora_folder)
    factor = np.float32(lora.update_factor(loaded.config, scale))
    base.component_path("unet")
    unet = abstract_module("unet", base.config)
    lora.check_fits(loaded.weights, unet, loaded.config, where=f"The LoRA {loaded.path}")
    warn_of_another_base(loaded, base.fingerprint)
    with CheckpointWriter(path, overwrite=overwrite) as writer:
        writer.add_tokenizer(base.path / "tokenizer")
        for component in base.component_paths:
            if component != "unet":
                writer.share(component, base.path)
        for name, array in iterate_leaves(base, "unet"):
            layer, _, leaf = name.rpartition(".")
            if leaf == "kernel" and layer in loaded.weights:
                pair = loaded.weights[layer]
                update = factor * (pair["a"] @ pair["b"])
                array = (array.astype(np.float32) + update).astype(array.dtype)
            writer.write("unet", {name: array})
        settings = {"base_fingerprint": loaded.base_fingerprint, "scale": scale}
        writer.commit(base.config, {**base.source, "lora": settings}, base.dtype)
