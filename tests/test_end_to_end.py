# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that diffusers wrote goes in, twenty prompts go in, diffusers' pictures come out."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from k3jax import Kandinsky3Pipeline
from k3jax.cli.main import main
from k3jax.images.pngs import ContactSheet


PROMPTS = """\
A cute corgi lives in a house made out of sushi.
a red circle
Mountains at dawn, oil on canvas
Portrait of an old sailor with a long white beard, 35 mm film
ein Leuchtturm im Sturm
кот на подоконнике
blueprint of a flying machine, ink on paper
"quoted text", 100% & more; <tags> too
   spaces   around   and	a tab
a
two cats, three dogs and one very small elephant walking in a row along the beach at sunset
macro photograph of a dew drop on a leaf
isometric voxel art of a tea shop in Kyoto, night, lanterns, light rain, highly detailed
an astronaut riding a horse
low quality, blurred, cropped
x-ray of a seashell
a map of an island that does not exist, drawn in 1623
watercolour of a fox in the snow
the number 42
A lighthouse. A storm. A ship that comes home at last, against all odds, with torn sails.
"""
SIZE, STEPS = 64, 5

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """What save_pretrained writes, with the real T5 vocabulary if it is available."""
    from diffusers import DDPMScheduler
    from diffusers import Kandinsky3Pipeline as TorchPipeline
    from transformers import T5Tokenizer

    import tiny
    import torch_checkpoints

    folder = tmp_path_factory.mktemp("diffusers")
    vocabulary = torch_checkpoints.real_tokenizer()
    if vocabulary is None:
        vocabulary = folder / "spiece"
        torch_checkpoints.write_spiece(vocabulary)
    tokenizer = T5Tokenizer.from_pretrained(vocabulary)
    config = dataclasses.replace(tiny.TEXT_ENCODER, vocab_size=-(-len(tokenizer) // 128) * 128)
    TorchPipeline(
        tokenizer=tokenizer,
        text_encoder=tiny.torch_text_encoder(config),
        unet=tiny.torch_unet(),
        scheduler=DDPMScheduler(**torch_checkpoints.SCHEDULER),
        movq=tiny.torch_movq(),
    ).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def test_twenty_prompts_from_a_file(source, tmp_path, monkeypatch, capsys):
    from diffusers import Kandinsky3Pipeline as TorchPipeline

    import tiny

    prompts_file = tmp_path / "prompts.txt"
    prompts_file.write_text(PROMPTS)
    prompts = prompts_file.read_text().splitlines()
    assert main(["convert", str(source), str(tmp_path / "ours")]) == 0

    rng = np.random.default_rng(0)
    shape = (len(prompts), SIZE // 8, SIZE // 8, 4)
    latents = rng.standard_normal(shape, np.float32)
    step_noise = rng.standard_normal((STEPS, *shape), np.float32)
    pipe = Kandinsky3Pipeline.from_pretrained(tmp_path / "ours", mesh="data=-1", dtype="float32")
    ours = pipe(
        prompts,
        height=SIZE,
        width=SIZE,
        num_inference_steps=STEPS,
        latents=latents,
        step_noise=step_noise,
        output_type="np",
    ).images

    theirs = TorchPipeline.from_pretrained(source)
    theirs.set_progress_bar_config(disable=True)
    expected = []
    for i, prompt in enumerate(prompts):
        draws = iter(step_noise[:, i : i + 1])
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor",
            lambda *args, draws=draws, **kwargs: tiny.nchw(next(draws)),
        )
        expected += theirs(
            prompt,
            num_inference_steps=STEPS,
            height=SIZE,
            width=SIZE,
            latents=tiny.nchw(latents[i : i + 1]),
            output_type="np",
        ).images.tolist()
    difference = np.abs(ours - np.asarray(expected, np.float32)).max()
    _side_by_side(ours, np.asarray(expected), prompts, tmp_path)
    with capsys.disabled():
        print(f"\n{len(prompts)} pictures, largest difference {255 * difference:.4f}/255")
    assert difference <= 1 / 255


def _side_by_side(ours, theirs, prompts, folder):
    """A sheet to look at: ours left, diffusers' right. K3JAX_SHEETS keeps it in that folder."""
    folder = Path(os.environ.get("K3JAX_SHEETS", folder))
    sheet = ContactSheet(len(prompts), 2 * SIZE, SIZE)
    for pair, prompt in zip(zip(ours, theirs, strict=True), prompts, strict=True):
        both = np.round(np.concatenate(pair, axis=1) * 255).astype(np.uint8)
        sheet.add(Image.fromarray(both), prompt)
    sheet.image().save(folder / "ours_and_diffusers.png")


def test_the_command_line_runs_the_converted_checkpoint(source, tmp_path, capsys):
    import torch
    from diffusers import Kandinsky3Pipeline as TorchPipeline

    ours, out = str(tmp_path / "ours"), tmp_path / "out"
    prompts_file = tmp_path / "prompts.txt"
    prompts_file.write_text("\n".join(PROMPTS.splitlines()[:3]))
    assert main(["convert", str(source), ours]) == 0
    assert main(["info", ours, "--verify"]) == 0
    arguments = ["--height", "64", "--width", "64", "--steps", "2", "--seed", "7"]
    common = ["--checkpoint", ours, "-o", str(out), "--prompts-file", str(prompts_file)]
    assert main(["generate", *common, *arguments, "--dtype", "float32"]) == 0
    assert len(list(out.glob("*seed*.png"))) == 3 and (out / "contact_sheet.png").exists()
    assert main(["export", ours, str(tmp_path / "back"), "--layout", "diffusers"]) == 0
    again = TorchPipeline.from_pretrained(tmp_path / "back")
    first = TorchPipeline.from_pretrained(source)
    for name, value in first.unet.state_dict().items():
        assert torch.equal(value, again.unet.state_dict()[name])
