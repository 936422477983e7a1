# SPDX-License-Identifier: Apache-2.0
"""Time of U-Net and decoder on the CPU, beside diffusers in PyTorch on the same weights.

  python tests/measure_beside_diffusers.py

float32, as users have either: no flag of XLA or PyTorch is set. The U-Net is Kandinsky 3's at half
its width (0.76 B parameters), one guided step of one prompt of 128 tokens; MoVQ is Kandinsky 3's.
Calls take turns, and the ratio is that of the medians.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
import torch

from k3jax.config import MoVQConfig, TextProjectionConfig, UNetConfig
from k3jax.model.context import PromptEmbeds

import tiny


UNET = UNetConfig(
    init_channels=96,
    block_out_channels=(192, 384, 768, 1536),
    time_embedding_dim=768,
    cross_attention_dim=2048,
)
CONFIG = dataclasses.replace(
    tiny.CONFIG,
    unet=UNET,
    text_projection=TextProjectionConfig(
        tiny.PROJECTION.d_model, UNET.cross_attention_dim, null_embedding=False
    ),
    movq=MoVQConfig(num_vq_embeddings=16384),
)
TOKENS = 128
ROUNDS = 5


def compare(name: str, ours: Callable[[], np.ndarray], theirs: Callable[[], np.ndarray]) -> None:
    """Prints a row of a table; the two compute the same (b, h, w, c)."""
    error = tiny.relative_error(ours(), theirs())  # also compiles
    seconds = {ours: [], theirs: []}
    for _ in range(ROUNDS):
        for call, taken in seconds.items():
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    mine, other = (statistics.median(taken) for taken in seconds.values())
    print(f"| {name} | {mine:.2f} | {other:.2f} | {other / mine:.2f} | {error:.0e} |", flush=True)


def unet() -> None:
    theirs = tiny.torch_unet(UNET)
    state = theirs.state_dict()
    for name, tensor in state.items():
        if "context_mlp" in name and tensor.ndim == 2:  # else rounding grows from block to block
            tensor.mul_(3 * tensor.shape[1] ** -0.5)
    parts = {
        part: {k: v for k, v in state.items() if ("encoder_hid_proj" in k) == (part != "unet")}
        for part in ("unet", "text_projection")
    }
    modules = [tiny.ours(part, CONFIG, tensors) for part, tensors in parts.items()]
    count = sum(tensor.numel() for tensor in state.values())
    rng = np.random.default_rng(0)
    embeds = rng.standard_normal((2, TOKENS, tiny.PROJECTION.d_model), np.float32)
    mask, lengths = np.ones((2, TOKENS), bool), np.full(2, TOKENS)
    timesteps = np.array([480.0, 480.0], np.float32)

    @jax.jit
    def step(module, projection, sample):
        context = projection(PromptEmbeds(embeds, mask, lengths), "diffusers")
        return module(sample, timesteps, context)

    for pixels in (256, 512):
        sample = rng.standard_normal((2, pixels // 8, pixels // 8, 4), np.float32)

        def other(sample=sample):
            with torch.inference_mode():
                given = map(torch.from_numpy, (timesteps, embeds, mask))
                return tiny.nhwc(theirs(tiny.nchw(sample), *given).sample)

        compare(
            f"U-Net of {count / 1e9:.2f} B, {pixels}x{pixels}",
            lambda sample=sample: np.asarray(step(*modules, sample)),
            other,
        )


def decoder() -> None:
    theirs = tiny.torch_movq(CONFIG.movq)
    module = tiny.ours("movq", CONFIG, theirs.state_dict())
    latents = np.random.default_rng(1).standard_normal((1, 32, 32, 4), np.float32)
    decode = jax.jit(lambda module, latents: module.decode(latents))

    def other():
        with torch.inference_mode():
            return tiny.nhwc(theirs.decode(tiny.nchw(latents), force_not_quantize=True).sample)

    compare("decoder, 256x256", lambda: np.asarray(decode(module, latents)), other)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    print("| | k3jax, s | diffusers, s | diffusers : k3jax | largest difference |")
    print("|---|---|---|---|---|")
    unet()
    decoder()
