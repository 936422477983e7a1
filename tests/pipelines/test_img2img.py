# SPDX-License-Identifier: Apache-2.0
"""Image to image against diffusers where it is right, and what it does wrong."""

import numpy as np
import pytest
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from PIL import Image

from k3jax.pipelines.image_to_image import Kandinsky3Img2ImgPipeline
from k3jax.sampling.samplers import least_strength, steps_of_strength

import tiny
from pictures import SCHEDULER, picture
from reference import cases
from reference.ours import last, pipeline


PROMPTS = ["a cat", "a much longer prompt about two dogs on a hill"]
STEPS = 6
LATENTS = (8, 8, 4)


def run(pipe, prompt="a cat", image=None, **kwargs):
    image = picture(0) if image is None else image
    kwargs = dict(num_inference_steps=STEPS, sampler="ddpm", strength=0.5) | kwargs
    kwargs = dict(output_type="np", progress_bar=False) | kwargs
    return pipe(prompt, image, **kwargs).images


def run_theirs(pipe, monkeypatch, prompt, image, strength, noise, step_noise, scheduler):
    pipe.scheduler = scheduler(**SCHEDULER)
    draws = iter(step_noise)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor",
        lambda *args, **kwargs: tiny.nchw(next(draws)),
    )
    monkeypatch.setattr(
        "diffusers.pipelines.kandinsky3.pipeline_kandinsky3_img2img.randn_tensor",
        lambda *args, **kwargs: tiny.nchw(noise),
    )
    out = pipe(
        prompt,
        Image.fromarray(image),
        strength=strength,
        num_inference_steps=STEPS,
        output_type="np",
    )
    return np.asarray(out.images)


@pytest.mark.parametrize(
    "sampler, scheduler, strength",
    [
        ("ddpm", DDPMScheduler, 0.5),
        ("ddpm", DDPMScheduler, 1.0),
        pytest.param("dpm++2m", DPMSolverMultistepScheduler, 0.5, marks=pytest.mark.slow),
    ],
)
def test_images_are_those_of_diffusers(img2img, theirs, monkeypatch, sampler, scheduler, strength):
    """Two prompts with two images in one call of ours."""
    made = int(STEPS * strength)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2, *LATENTS), np.float32)
    step_noise = rng.standard_normal((made, 2, *LATENTS), np.float32)
    images = [picture(0), picture(1)]
    got = run(
        img2img,
        PROMPTS,
        [Image.fromarray(image) for image in images],
        strength=strength,
        sampler=sampler,
        latents=noise,
        step_noise=step_noise,
    )
    for k in range(2):
        part = slice(k, k + 1)
        args = PROMPTS[k], images[k], strength, noise[part], step_noise[:, part], scheduler
        expected = run_theirs(theirs, monkeypatch, *args)
        assert expected.std() > 0.1
        assert np.abs(got[part] - expected).max() <= 1 / 255


def test_steps_are_those_of_diffusers(theirs):
    theirs.scheduler = DDPMScheduler(**SCHEDULER)
    for steps in (1, 4, 7, 25, 50, 49, 100):
        theirs.scheduler.set_timesteps(steps)
        for strength in np.arange(1, 101) / 100:
            expected = theirs.get_timesteps(steps, strength, "cpu")[1]
            if expected:
                assert steps_of_strength(float(strength), steps) == expected
            else:
                with pytest.raises(ValueError, match=r"leaves none of \d+ steps: give at least"):
                    steps_of_strength(float(strength), steps)


def test_the_least_strength_is_enough():
    for steps in range(1, 1001):
        assert steps_of_strength(least_strength(steps), steps) == 1


def test_each_image_has_noise_of_its_own(img2img):
    """diffusers draws one noise for one image, which its prompts then share."""
    two = run(img2img, ["a cat"] * 2)
    assert np.abs(two[0] - two[1]).max() > 2 / 255
    assert np.array_equal(two[1:], run(img2img, seed=1))


def test_one_image_or_one_prompt_goes_with_all(img2img):
    images = [picture(0), picture(1)]
    each = run(img2img, PROMPTS, [images[0]] * 2, negative_prompt="bad")
    assert np.array_equal(each, run(img2img, PROMPTS, images[0], negative_prompt="bad"))
    each = run(img2img, ["a cat"] * 2, images, negative_prompt=["bad", None])
    assert np.array_equal(each, run(img2img, "a cat", images, negative_prompt=["bad", None]))
    embeds = img2img.encode_prompt("a cat")
    again = run(img2img, None, images, prompt_embeds=embeds)
    assert np.array_equal(again, run(img2img, "a cat", images))
    with pytest.raises(ValueError, match="2 prompts and 3 images: give one for all, or one for"):
        run(img2img, PROMPTS, [images[0]] * 3)


def test_several_sizes_and_strengths_in_one_call(img2img):
    """Bucketed by size and steps; every result in its image's own size, and the same as alone."""
    images = [picture(0), picture(1, 130, 70), picture(2, 70, 66), picture(3), picture(4, 130, 70)]
    strengths = [0.5, 0.5, 0.5, 1.0, 0.5]
    made = run(img2img, "a cat", images, strength=strengths, seed=7, num_images_per_prompt=2)
    assert [m.shape[:2] for m in made[::2]] == [image.shape[:2] for image in images]
    for k in (1, 3):
        alone = run(img2img, "a cat", images[k], strength=strengths[k], seed=7 + 2 * k + 1)
        assert np.array_equal(alone[0], made[2 * k + 1])
    assert all(0 <= m.min() and m.max() <= 1 for m in made)


def test_strength_0_is_the_autoencoded_image(img2img):
    image = picture(0)
    (expected,) = img2img.decode(img2img.encode_image(image), "np").images
    (got,) = run(img2img, image=image, strength=0)
    assert np.array_equal(got, expected)
    both = run(img2img, "a cat", [image, image], strength=[0, 0.5])
    assert np.array_equal(both[0], expected) and not np.array_equal(both[1], expected)
    (pil,) = run(img2img, image=image, strength=0.0, output_type="pil")
    assert np.array_equal(np.asarray(pil), np.rint(expected * 255).astype(np.uint8))


def test_flash_refines_as_the_original():
    """Its last two steps (479, 229) over an image."""
    golden = cases.load("original_pipeline_flash_refine")
    pipe = pipeline(Kandinsky3Img2ImgPipeline, "unet4", batch_size=2)
    arguments = dict(
        sampler="flash",
        strength=0.5,
        num_images_per_prompt=2,
        step_noise=last(golden["step_noise"]),
        output_type="np",
        progress_bar=False,
    )
    prompts = golden["meta"]["prompts"]
    got = pipe(prompts, golden["image"], **arguments).images
    assert np.abs(got - last(golden["images"])).max() <= 1 / 255
    # What another checkpoint left as latents is refined without an image in between.
    latents = pipe.encode_image(golden["image"])
    again = pipe(prompts, image_latents=latents, **arguments).images
    assert np.array_equal(again, got)


def test_guidance_intervals_count_the_whole_schedule(img2img):
    """Of 6 steps strength 0.5 leaves the last three, 3 to 5."""
    image = picture(0)
    everywhere = run(img2img, image=image, strength=0.5)
    without = run(img2img, image=image, strength=0.5, guidance_scale=0)
    assert np.abs(without - everywhere).max() > 2 / 255
    same = run(img2img, image=image, strength=0.5, guidance_interval=(3, 5))
    assert np.abs(same - everywhere).max() <= 1 / 255
    with pytest.warns(UserWarning, match="guides none of the steps 3 to 5 that strength 0.5"):
        none = run(img2img, image=image, strength=0.5, guidance_interval=(0, 2))
    assert np.abs(none - without).max() <= 1 / 255
