# SPDX-License-Identifier: Apache-2.0
"""The U-Net at its real size: converted, restored in bfloat16, one guided step like diffusers'.

More than seven minutes on two slow cores, so only .ci/run --all has it:

    pytest -n 0 -m slow tests/model/test_fullsize.py
"""

import json
import os
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import Kandinsky3UNet

from k3jax.config import TextEncoderConfig
from k3jax.convert.safetensors_writer import SafetensorsWriter

import tiny
import torch_checkpoints


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SIZE = 256  # pixels
TOKENS = 9

RUN = """
import json, pathlib, resource, sys, time
import numpy as np
from k3jax import Kandinsky3Pipeline
from k3jax.model.abstract import parameter_count
from k3jax.convert.from_torch import convert
from k3jax.model.context import PromptEmbeds

source, ours, inputs, out = sys.argv[1:]
convert(source, ours, progress=False)
pipe = Kandinsky3Pipeline.from_pretrained(ours, dtype="bfloat16")
data = np.load(inputs)
weights = sum(x.nbytes for x in __import__("jax").tree.leaves(pipe.unet))
start = time.perf_counter()
def step(guidance_scale):
    return pipe(
        prompt_embeds=PromptEmbeds(data["embeds"], data["mask"], data["mask"].sum(1) + 1),
        latents=data["latents"], step_noise=data["noise"], height=SIZE, width=SIZE,
        guidance_scale=guidance_scale, num_inference_steps=1, sampler="ddpm",
        output_type="latent", progress_bar=False,
    ).images

guided = step(3.0)
seconds = time.perf_counter() - start
np.savez(out, guided=guided, plain=step(0.0))
peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({
    "parameters": parameter_count(pipe.unet), "weights": weights, "peak": peak,
    "seconds": seconds,
}))
""".replace("SIZE", str(SIZE))


def write_unet(folder):
    """diffusers' default U-Net with random bfloat16 weights that keep activations in range."""
    shutil.rmtree(folder)
    with torch.device("meta"):
        model = Kandinsky3UNet()
    model.save_config(folder)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    writer = SafetensorsWriter(
        folder / "diffusion_pytorch_model.safetensors",
        {name: (BFLOAT16, shape) for name, shape in shapes.items()},
    )
    rng = np.random.default_rng(0)
    block = rng.standard_normal(1 << 24, np.float32)  # drawing 3 billion values takes minutes
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        start = int(rng.integers(0, 1 << 20))
        values = np.resize(block[start:], size).reshape(shape)
        if "context_mlp" in name:
            values = values * np.float32(0.3 * shape[-1] ** -0.5)
        elif len(shape) > 1:
            values = values * np.float32(np.prod(shape[1:]) ** -0.5)
        else:
            values = values * np.float32(0.1) + np.float32("norm" in name and "weight" in name)
        writer.write(name, values.astype(BFLOAT16))
    writer.close()


def noise_error(latents, after, expected):
    """Mean error of the noise that one step of the published scheduler, at time 1, took off."""
    signal = np.float32(0.99991256)  # alphas_cumprod[1]; the step ends at the limited image
    noise = (latents - after * np.sqrt(signal)) / np.sqrt(1 - signal)
    inside = np.abs(after) < 1  # not cut off by clip_sample
    assert inside.mean() > 0.9
    return np.abs(noise - expected)[inside].mean() / np.abs(expected)[inside].mean()


@pytest.mark.slow
def test_full_size_unet_makes_a_step(tmp_path, capsys):
    source, ours = tmp_path / "source", tmp_path / "ours"
    try:
        torch_checkpoints.write_diffusers(source)
        shutil.rmtree(source / "text_encoder")
        config = TextEncoderConfig(259, 4096, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        tiny.torch_text_encoder(config).save_pretrained(source / "text_encoder")
        write_unet(source / "unet")

        rng = np.random.default_rng(1)
        shape = (SIZE // 8, SIZE // 8, 4)
        data = {
            "embeds": rng.standard_normal((1, 128, 4096), np.float32),
            "mask": np.arange(128)[None] < TOKENS,
            "latents": 0.4 * rng.standard_normal((1, *shape), np.float32),
            "noise": np.zeros((1, 1, *shape), np.float32),
        }
        np.savez(tmp_path / "inputs.npz", **data)
        run = subprocess.run(
            [
                sys.executable,
                "-c",
                RUN,
                *map(str, (source, ours, tmp_path / "inputs.npz", tmp_path / "out.npz")),
            ],
            check=True,
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                # XLA:CPU computes bfloat16 in float32; without this it widens all weights at once.
                "XLA_FLAGS": "--xla_cpu_enable_concurrency_optimized_scheduler=false",
            },
        )
        found = json.loads(run.stdout.splitlines()[-1])
        got = np.load(tmp_path / "out.npz")
        shutil.rmtree(ours)

        unet = Kandinsky3UNet.from_pretrained(source / "unet", torch_dtype=torch.bfloat16)
        window = TOKENS + 1
        embeds = torch.tensor(data["embeds"] * data["mask"][..., None])[:, :window]
        mask = torch.tensor(data["mask"], dtype=torch.int64)[:, :window]
        sample = tiny.nchw(data["latents"]).to(torch.bfloat16)
        with torch.no_grad():
            cond, uncond = (
                unet(
                    torch.cat([sample] * 2),
                    torch.tensor([1.0, 1.0]),
                    encoder_hidden_states=torch.cat([embeds, embeds * 0]).to(torch.bfloat16),
                    encoder_attention_mask=torch.cat([mask, mask * 0]),
                )
                .sample.float()
                .chunk(2)
            )
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)  # gigabytes

    cond, uncond = tiny.nhwc(cond), tiny.nhwc(uncond)
    errors = {
        "plain": noise_error(data["latents"], got["plain"], cond),
        "guided": noise_error(data["latents"], got["guided"], 4 * cond - 3 * uncond),
    }
    with capsys.disabled():
        print(
            f"\n{found['parameters']:,} parameters, {found['weights'] / 1e9:.2f} GB; one guided "
            f"step at {SIZE}x{SIZE} in {found['seconds']:.0f} s with compilation; peak memory "
            f"of conversion, loading and the step {found['peak'] / 1e9:.1f} GB; noise off by "
            f"{errors['plain']:.1%} from diffusers' bfloat16 ({errors['guided']:.1%} guided)"
        )
    assert found["parameters"] == 3_038_562_820
    # Both are bfloat16. Guidance takes the difference of two nearly equal predictions, so the
    # rounding of each counts several times.
    assert errors["plain"] < 0.1 and errors["guided"] < 0.25, errors
