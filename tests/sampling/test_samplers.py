# SPDX-License-Identifier: Apache-2.0
"""The samplers against diffusers' schedulers, with an analytic stand-in for the U-Net."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from k3jax.config import SamplerConfig, SamplerName
from k3jax.sampling import schedule
from k3jax.sampling.denoise import (
    denoise,
    draw_noise,
    initial_state,
    loop_rows,
    sample_keys,
    window,
)
from k3jax.sampling.samplers import SAMPLERS, last_steps, make_sampler

import tiny


SHAPE = (2, 8, 8, 4)
PUBLISHED = dict(  # scheduler_config.json of the published diffusers checkpoint
    num_train_timesteps=1000,
    beta_schedule="squaredcos_cap_v2",
    steps_offset=1,
    clip_sample=True,
    timestep_spacing="leading",
    thresholding=False,
)


def epsilon(x, t, cos):
    return 0.8 * x * cos(t / 700) + 0.1


def run(sampler, latents, noise=None, key_data=None):
    def predict(x, timestep, guide):
        return epsilon(x, timestep, jnp.cos)

    rows = {k: jnp.asarray(v) for k, v in loop_rows(sampler).items()}
    carry = initial_state(jnp.asarray(latents))
    step_noise = None if noise is None or not sampler.stochastic else jnp.asarray(noise)
    return np.asarray(
        jax.jit(
            lambda carry, rows, step_noise: denoise(
                predict,
                sampler.step,
                rows,
                carry,
                key_data=key_data,
                step_noise=step_noise,
                renoise=sampler.renoise,
            )[0]
        )(carry, rows, step_noise)
    )


def run_diffusers(
    scheduler, monkeypatch, latents, noise, num_steps=None, timesteps=None, stop=None, **step
):
    """diffusers' loop with the given noise arrays in the order in which they are asked for."""
    draws = iter(noise)
    for module in ("ddpm", "ddim"):
        monkeypatch.setattr(
            f"diffusers.schedulers.scheduling_{module}.randn_tensor",
            lambda *args, **kwargs: tiny.nchw(next(draws)),
        )
    if timesteps is None:
        scheduler.set_timesteps(num_steps)
    else:
        scheduler.set_timesteps(timesteps=timesteps)
    x = tiny.nchw(latents)
    for t in scheduler.timesteps[:stop]:
        x = scheduler.step(epsilon(x, t, torch.cos), t, x, **step).prev_sample
    return tiny.nhwc(x)


def arrays(steps, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(SHAPE, np.float32), rng.standard_normal((steps, *SHAPE), np.float32)


@pytest.mark.parametrize("steps", [4, 25, 30])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm(monkeypatch, steps, spacing, variance):
    config = SamplerConfig("ddpm", steps, timestep_spacing=spacing, variance_type=variance)
    sampler = make_sampler(config)
    latents, noise = arrays(steps)
    theirs = DDPMScheduler(**PUBLISHED | dict(timestep_spacing=spacing), variance_type=variance)
    expected = run_diffusers(theirs, monkeypatch, latents, noise, steps)
    assert np.array_equal(sampler.rows["timestep"], theirs.timesteps.numpy())
    assert np.abs(run(sampler, latents, noise) - expected).max() < 2e-5


def test_ddpm_with_dynamic_threshold(monkeypatch):
    settings = dict(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1.5)
    sampler = make_sampler(SamplerConfig("ddpm", 10, **settings))
    latents, noise = arrays(10)
    theirs = DDPMScheduler(**PUBLISHED | settings)
    expected = run_diffusers(theirs, monkeypatch, latents, noise, 10)
    assert np.abs(run(sampler, latents, noise) - expected).max() < 2e-5


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_ddim(monkeypatch, eta, set_alpha_to_one):
    settings = dict(set_alpha_to_one=set_alpha_to_one)
    sampler = make_sampler(SamplerConfig("ddim", 20, eta=eta, **settings))
    assert sampler.stochastic == (eta > 0)
    latents, noise = arrays(20)
    theirs = DDIMScheduler(**PUBLISHED | settings)
    expected = run_diffusers(theirs, monkeypatch, latents, noise, 20, eta=eta)
    assert np.abs(run(sampler, latents, noise) - expected).max() < 2e-5


@pytest.mark.parametrize("steps", [1, 2, 8, 20])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_dpm_solver(monkeypatch, steps, spacing):
    sampler = make_sampler(SamplerConfig("dpm++2m", steps, timestep_spacing=spacing))
    latents, _ = arrays(steps)
    theirs = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", steps_offset=1, timestep_spacing=spacing
    )
    expected = run_diffusers(theirs, monkeypatch, latents, (), steps)
    assert np.array_equal(sampler.rows["timestep"], theirs.timesteps.numpy())
    scale = np.abs(expected).max()  # trailing starts at time 999, where 1/alpha is 20,000
    assert np.abs(run(sampler, latents) - expected).max() < 5e-5 * scale


def test_kandinsky_with_eta_1_is_ddpm_with_a_dynamic_threshold(monkeypatch):
    """All steps but the last, which goes to alphas_cumprod[0] where diffusers goes to 1."""
    timesteps = list(range(999, 0, -20))
    sampler = make_sampler(SamplerConfig("kandinsky", 50))
    latents, noise = arrays(50)
    theirs = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        thresholding=True,
        dynamic_thresholding_ratio=0.99,
        sample_max_value=1e9,
    )

    def difference(steps):
        rows = {name: column[:steps] for name, column in sampler.rows.items()}
        got = run(dataclasses.replace(sampler, rows=rows), latents, noise[:steps])
        # The timestep after the last decides where the last step goes.
        expected = run_diffusers(
            theirs, monkeypatch, latents, noise, timesteps=timesteps, stop=steps
        )
        return np.abs(got - expected).max()

    assert difference(49) < 5e-5
    assert difference(50) > 1e-3


@pytest.mark.parametrize("name", SAMPLERS)
def test_windows_are_the_whole_loop(name):
    """Seven steps in windows with inactive rows, which remember what multistep samplers need."""
    sampler = make_sampler(SamplerConfig(name, 7))
    latents, noise = arrays(sampler.num_steps)
    rows, state = loop_rows(sampler), initial_state(jnp.asarray(latents))
    noise = noise if sampler.stochastic else None

    evaluated = []

    def predict(x, timestep, guide):
        jax.debug.callback(evaluated.append, timestep)
        return epsilon(x, timestep, jnp.cos)

    @jax.jit
    def run_window(state, rows, step_noise):
        settings = dict(key_data=None, step_noise=step_noise, renoise=sampler.renoise)
        return denoise(predict, sampler.step, rows, state, **settings)

    for first in range(0, sampler.num_steps, 3):
        count = min(3, sampler.num_steps - first)
        state = run_window(state, *window(rows, noise, first, count))
    jax.effects_barrier()  # inactive rows evaluate nothing
    assert run_window._cache_size() == 1
    assert sorted(evaluated, reverse=True) == rows["timestep"].tolist()
    np.testing.assert_allclose(state.latents, run(sampler, latents, noise), rtol=1e-5, atol=1e-6)


def test_timestep_lists():
    for steps in (4, 5, 7, 25, 30, 50, 100, 300, 600, 1000):
        expected = list(range(999, 0, -1000 // steps))
        assert schedule.kandinsky_timesteps(steps).tolist() == expected
    assert len(schedule.kandinsky_timesteps(300)) == 250
    for steps, first in ((25, 961), (50, 981), (5, 801), (4, 751)):
        timesteps = schedule.diffusers_timesteps(SamplerConfig("ddpm"), steps)
        assert (timesteps[0], timesteps[-1]) == (first, 1)


@pytest.mark.parametrize("steps", [1, 2, 3, 250, 499, 500, 501, 667, 998, 999, 1000, 1001])
def test_every_table_falls_from_step_to_step(steps):
    """Or it is refused; diffusers' own are of no use at 1000 steps of DPM-Solver, for one."""
    for name in get_args(SamplerName):
        for spacing in ("leading", "trailing", "linspace"):
            config = SamplerConfig(name, steps, timestep_spacing=spacing)
            possible = steps <= 1000 and (name, steps) != ("kandinsky30", 1)
            if (name, spacing) in (("ddpm", "leading"), ("ddim", "leading")):
                possible = steps <= 999
            if name == "dpm++2m":
                possible = steps <= {"leading": 998, "linspace": 999, "trailing": 1000}[spacing]
            if not possible:
                with pytest.raises(ValueError, match="step"):
                    make_sampler(config)
                continue
            rows = make_sampler(config).rows
            assert all(np.isfinite(column).all() for column in rows.values()), config
            assert (np.diff(rows["timestep"]) < 0).all(), config
            assert rows["timestep"][0] <= 999 and rows["timestep"][-1] >= 0, config
            if name not in ("flash", "kandinsky"):
                assert len(rows["timestep"]) == steps


def test_the_most_steps_are_named():
    with pytest.raises(ValueError, match=r"is 1000, which does not fit .* \(998 is the most"):
        make_sampler(SamplerConfig("dpm++2m", 1000))


def test_a_step_that_diffusers_makes_too_many():
    """Its 499 trailing steps are 500, the last of them at time -1."""
    theirs = DDPMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    theirs.set_timesteps(499)
    assert theirs.timesteps[-2:].tolist() == [1, -1]
    ours = make_sampler(SamplerConfig("ddpm", 499, timestep_spacing="trailing"))
    assert ours.rows["timestep"].tolist() == theirs.timesteps[:-1].tolist()


def test_guidance_intervals_count_the_whole_schedule():
    sampler = make_sampler(SamplerConfig("ddim", 10))
    assert np.flatnonzero(loop_rows(sampler, (4, 7))["guide"]).tolist() == [4, 5, 6, 7]
    part = last_steps(last_steps(sampler, 6), 5)
    rows = loop_rows(part, (4, 7))
    assert part.first_step == 5
    assert rows["guide"].tolist() == [True, True, True, False, False]
    assert rows["index"].tolist() == [0, 1, 2, 3, 4]
    assert not loop_rows(part, (0, 4))["guide"].any()
    for each in (sampler, part):
        with pytest.raises(ValueError, match=r"of 10 steps, within \(0, 9\)"):
            loop_rows(each, (4, 10))


def test_noise_depends_on_the_seed_alone():
    keys = sample_keys([7, 8, 2**63 + 5, 5])
    noise = draw_noise(keys, 3, (4, 4, 2))
    assert np.array_equal(noise[1], draw_noise(sample_keys([8]), 3, (4, 4, 2))[0])
    assert not np.array_equal(noise[2], noise[3])  # all 64 bits of a seed count
    assert not np.array_equal(noise[1], draw_noise(sample_keys([8]), 4, (4, 4, 2))[0])
    with pytest.raises(ValueError, match="seed -1 is not between"):
        sample_keys([-1])


def test_drawn_noise_is_what_injected_noise_would_be():
    sampler = make_sampler(SamplerConfig("kandinsky", 5))
    latents, _ = arrays(5)
    keys = sample_keys([11, 12])
    noise = np.stack([draw_noise(keys, i + 1, SHAPE[1:]) for i in range(5)])
    drawn = run(sampler, latents, key_data=jnp.asarray(keys))
    assert np.abs(drawn - run(sampler, latents, noise)).max() < 1e-6


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(num_inference_steps=0), "num_inference_steps is 0"),
        (dict(num_inference_steps=1001), "between 1 and 1000"),
        (dict(eta=1.5), "eta is 1.5"),
        (dict(name="kandinsky30", num_inference_steps=1), "at least 2 steps"),
        (dict(name="ddpm", num_inference_steps=1000), "ask for fewer steps"),
        (dict(num_inference_steps=2.5), "num_inference_steps is 2.5; it must be a whole number"),
        (dict(eta=float("nan")), "eta is nan; it must be a finite number"),
        (dict(name="ddpm", variance_type="learned"), "'learned' is not supported"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(SamplerConfig(**settings))
