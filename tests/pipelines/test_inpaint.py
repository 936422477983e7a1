# SPDX-License-Identifier: Apache-2.0
"""Inpainting and outpainting: what the model sees, both methods, and what comes back."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from k3jax.images.compositing import extend_canvas, generated_share, work_size
from k3jax.images.masks import read_mask, resize_mask
from k3jax.pipelines.image_inputs import EmptyMaskWarning
from k3jax.pipelines.inpaint import Kandinsky3InpaintPipeline
from k3jax.pipelines.programs import encode_masked
from k3jax.sharding import make_mesh

import tiny
from pictures import SCHEDULER, picture
from reference import cases
from reference.ours import COMPONENTS, component, config, last, pipeline


STEPS = 6


def box(width: int = 64, height: int = 64) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[16:48, 24:60] = True
    return mask


def run(pipe, prompt="a cat", image=None, mask=None, **kwargs):
    image = picture(0) if image is None else image
    mask = box() if mask is None else mask
    kwargs = dict(num_inference_steps=STEPS, output_type="np", progress_bar=False) | kwargs
    return pipe(prompt, image, mask, **kwargs).images


@pytest.fixture(scope="module")
def nine():
    """The stored 9-channel model; the percentile is that of an inpainting checkpoint."""
    model = config("unet9")
    sampler = dataclasses.replace(model.sampler, threshold_percentile=0.95, guidance_scale=4.0)
    model = dataclasses.replace(model, sampler=sampler)
    return pipeline(Kandinsky3InpaintPipeline, "unet9", model=model)


# --- the model's method -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("case", ["inpainting_10", "inpainting_odd"])
def test_images_are_those_of_the_original(nine, case):
    """A hard mask; and an image of an odd size with a soft one. 2 images of each prompt."""
    golden = cases.load(f"original_pipeline_{case}")
    meta = golden["meta"]
    latents = run(
        nine,
        meta["prompts"],
        golden["image"],
        golden["repaint"],
        num_inference_steps=meta["steps"],
        num_images_per_prompt=2,
        latents=last(golden["x_T"]),
        step_noise=last(golden["step_noise"]),
        output_type="latent",
    )
    got = nine.decode(latents, "np").images
    assert np.abs(got - last(golden["images"])).max() <= 1 / 255


@pytest.mark.parametrize("case", ["inpainting_10", "inpainting_odd"])
def test_the_model_sees_what_the_original_gives_it(case):
    """Polarity, grey fill before encoding, bilinear mask, nearest downsampling."""
    golden = cases.load(f"original_pipeline_{case}")
    image, repaint = Image.fromarray(golden["image"]), read_mask(golden["repaint"])
    size = work_size(*image.size, 1024**2, 64)
    known = (1 - resize_mask(repaint, *size))[None].astype(np.float32)
    array = np.asarray(image.resize(size, Image.Resampling.BICUBIC))[None]
    got = np.asarray(encode_masked(component("movq"), array, known, splits=1))
    assert np.abs(got[..., :1] - last(golden["mask"])).max() < 1e-6
    assert tiny.relative_error(got[..., 1:], last(golden["masked_latent"])) < 1e-5


def test_sizes_are_those_of_the_original():
    """What resize_image_for_diffusion of the original gives, where that is an image at all."""
    for size, expected in {
        (768, 768): (768, 768),
        (1000, 700): (960, 640),
        (2000, 1500): (1152, 832),
        (4000, 3000): (1152, 832),
        (1030, 1030): (1024, 1024),
        (10_000, 100): (9984, 64),
        (65, 127): (64, 64),
    }.items():
        assert work_size(*size, 1024**2, 64) == expected
    assert work_size(2000, 1500, 512**2, 64) == (576, 384)
    # What is smaller than 64 is enlarged.
    assert work_size(1, 1, 1024**2, 64) == (64, 64)
    assert work_size(30, 50, 1024**2, 64) == (64, 64)
    assert work_size(30, 70, 1024**2, 64) == (64, 128)


def test_masks_of_all_forms_mean_the_same(nine):
    """Boolean, 0/1 and 0/255, of any dtype, and PIL: also where they are resized."""
    image, mask = picture(0, 100, 70), box(100, 70)
    grey = Image.fromarray(mask)
    forms = [
        mask,
        *(mask.astype(kind) for kind in (np.uint8, np.int64, np.float32, np.float64)),
        *(mask.astype(kind) * 255 for kind in (np.uint8, np.int32, np.float32)),
        mask.astype(np.uint16) * 65535,
        mask[:, :, None],
        np.repeat(mask[:, :, None] * np.uint8(255), 3, axis=2),
        grey,
        *(grey.convert("L").convert(mode) for mode in ("L", "RGB", "P", "RGBA", "I", "F")),
        Image.fromarray(mask.astype(np.uint8)),
        Image.fromarray(mask.astype(np.uint16) * 65535),
    ]
    for form in forms:
        assert np.array_equal(read_mask(form), mask.astype(np.float32))
    two = [run(nine, "3 4", image, form)[0] for form in (mask, mask * np.uint8(255))]
    assert np.array_equal(*two)


def test_negative_prompts_work(nine):
    """The original crashes with one."""
    plain, negative = run(nine, ["3 4"] * 2, negative_prompt=[None, "5 6 7"], seed=[1, 1])
    assert np.abs(plain - negative).max() > 2 / 255
    assert np.array_equal(run(nine, "3 4", seed=1)[0], plain)


# --- blending -----------------------------------------------------------------------------------


def test_a_checkpoint_of_4_channels_blends(blend, nine, theirs):
    """Against a loop of diffusers' own parts: the noised known latents before every step."""
    assert blend.method == "blend" and nine.method == "model"
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((1, 8, 8, 4), np.float32)
    step_noise = rng.standard_normal((STEPS, 1, 8, 8, 4), np.float32)
    got = run(
        blend,
        sampler="ddpm",
        guidance_scale=0.0,
        latents=noise,
        step_noise=step_noise,
        output_type="latent",
    )
    scheduler = DDPMScheduler(**SCHEDULER)
    scheduler.set_timesteps(STEPS)
    embeds, _, mask, _ = theirs.encode_prompt("a cat", False, _cut_context=True)
    image = torch.from_numpy(picture(0)).permute(2, 0, 1)[None].float() / 127.5 - 1
    known_mask = torch.ones(1, 1, 8, 8)
    known_mask[:, :, 2:6, 3:8] = 0  # all latents with a pixel of the mask
    x, start = tiny.nchw(noise), tiny.nchw(noise)
    draws = iter(step_noise)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor",
            lambda *args, **kwargs: tiny.nchw(next(draws)),
        )
        known = theirs.movq.encode(image).latents
        for t in scheduler.timesteps:
            there = scheduler.add_noise(known, start, t[None])
            x = known_mask * there + (1 - known_mask) * x
            output = theirs.unet(x, t, encoder_hidden_states=embeds, encoder_attention_mask=mask)
            x = scheduler.step(output.sample, t, x).prev_sample
        x = known_mask * known + (1 - known_mask) * x
    assert tiny.relative_error(got, tiny.nhwc(x)) < 1e-4


# --- what comes back ----------------------------------------------------------------------------


def test_known_pixels_come_back_exactly(nine):
    """In the image's own size; outside of mask and feather nothing changes, inside all does."""
    image, mask = picture(0, 100, 70), box(100, 70)
    (made,) = run(nine, "3 4", image, mask, output_type="pil")
    made = np.asarray(made)
    assert made.shape == image.shape
    rows, columns = np.mgrid[:70, :100]
    outside = np.hypot(
        np.maximum(np.maximum(16 - rows, rows - 47), 0),
        np.maximum(np.maximum(24 - columns, columns - 59), 0),
    )
    feather = 8 * 100 / 64  # a latent's share of this image, which is worked on at 64 x 64
    assert np.array_equal(made[outside > feather + 1], image[outside > feather + 1])
    assert (made[(outside > 0) & (outside < 4)] != image[(outside > 0) & (outside < 4)]).any()

    raw = run(nine, "3 4", image, mask, paste_back=False)[0]
    hard = run(nine, "3 4", image, mask, feather=0)[0]
    assert np.array_equal(hard[mask], raw[mask])
    assert np.array_equal(hard[~mask], (image / np.float32(255))[~mask])
    assert (raw[~mask] != hard[~mask]).any()
    assert np.abs(made / 255 - hard)[mask].max() <= 2 / 255


def test_a_feather_is_steepest_nowhere_and_keeps_soft_masks():
    mask = np.zeros((9, 40), np.float32)
    mask[:, :10] = 1
    mask[:, 30:] = 0.4
    share = generated_share(mask, 4)
    assert np.allclose(share[0, 8:16], [1, 1, 0.8, 0.6, 0.4, 0.2, 0, 0], atol=1e-6)
    assert np.array_equal(share[:, 30:], mask[:, 30:])
    assert np.array_equal(generated_share(mask, 0), mask)


def test_empty_and_full_masks(nine, strict):
    image = picture(0)
    with pytest.warns(EmptyMaskWarning, match=r"mask_image is empty \(all black\)"):
        (same,) = run(nine, "3 4", image, np.zeros((64, 64)), output_type="pil")
    assert np.array_equal(np.asarray(same), image)
    everything = np.ones((64, 64))
    got = run(nine, "3 4", image, everything)
    assert np.array_equal(got, run(nine, "3 4", image, everything, paste_back=False))
    # Nothing of the image is seen: another one gives the same.
    assert np.array_equal(got, run(nine, "3 4", picture(3), everything))


def test_lists_of_several_sizes(nine):
    """One prompt and one mask for all; the same as alone."""
    images = [picture(0), picture(1, 130, 70), picture(2)]
    masks = [box(), box(130, 70), ~box()]
    made = run(nine, "3 4", images, masks, seed=5, strength=[1, 1, 0.5])
    assert [m.shape for m in made] == [image.shape for image in images]
    alone = run(nine, "3 4", images[1], masks[1], seed=6)
    assert np.array_equal(alone[0], made[1])
    alone = run(nine, "3 4", images[2], masks[2], seed=7, strength=0.5)
    assert np.array_equal(alone[0], made[2])
    both = run(nine, ["3 4", "3 4"], images[0], masks[0])
    assert np.array_equal(both, run(nine, "3 4", [images[0]] * 2, masks[0]))


@pytest.mark.slow
def test_the_mesh_does_not_matter(nine):
    """Three images on two devices, one row of padding: bit for bit as one by one."""
    images, masks = [picture(k) for k in range(3)], [box(), ~box(), box()]
    mesh = make_mesh("data=2", jax.devices()[:2])
    modules = {
        name: jax.device_put(module, tiny.module_shardings(module, mesh))
        for name in COMPONENTS
        for module in [getattr(nine, name)]
    }
    wide = Kandinsky3InpaintPipeline(nine.config, nine.tokenizer, modules, mesh)
    assert wide.batch_size == 2
    got, alone = (run(p, "3 4", images, masks, seed=3, sampler="ddpm") for p in (wide, nine))
    assert np.array_equal(got, alone)


def test_outpainting(nine):
    image = picture(0)
    canvas, mask = extend_canvas(image, left=10, right=54)
    assert canvas.size == mask.size == (128, 64)
    assert np.array_equal(np.asarray(canvas)[:, 10:74], image)
    assert np.asarray(mask).sum() == 255 * 64 * 64
    (made,) = run(nine, "3 4", canvas, mask, feather=4, output_type="pil")
    made = np.asarray(made)
    assert made.shape == (64, 128, 3)
    assert np.array_equal(made[:, 14:70], image[:, 4:60])
    assert (made[:, 80:] != np.asarray(canvas)[:, 80:]).mean() > 0.9


@pytest.mark.parametrize(
    "sides, message",
    [
        ({}, "give the pixels to add on at least one of left, top, right, bottom"),
        (dict(left=-1), "left is -1; it must be 0 or more"),
        (dict(top=1.5), "top is 1.5; it must be a whole number"),
        (dict(right=10**9), "is too large .* make left, top, right or bottom smaller"),
    ],
)
def test_bad_sides(sides, message):
    with pytest.raises(ValueError, match=message):
        extend_canvas(picture(0), **sides)
