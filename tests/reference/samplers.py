# SPDX-License-Identifier: Apache-2.0
"""Runs the original samplers on a closed formula instead of a U-Net. For make_original.py."""

from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

from . import cases, original
from .weights import normal


SHAPE = (2, 4, 8, 8)
TOKENS, SEEN = 10, (9, 4)
STEP_COUNTS = (4, 5, 7, 25, 30, 50, 100, 300, 600, 1000)

# name: steps, eta, guidance scale, percentile
KANDINSKY = {
    "kandinsky_5": (5, 1.0, 3.0, 0.99),
    "kandinsky_25": (25, 1.0, 3.0, 0.99),
    "kandinsky_50": (50, 1.0, 3.0, 0.99),
    "kandinsky_30": (30, 1.0, 3.0, 0.99),
    "kandinsky_5_eta": (5, 0.25, 3.0, 0.99),
    "kandinsky_25_eta": (25, 0.25, 3.0, 0.99),
    "kandinsky_50_eta": (50, 0.25, 3.0, 0.99),
    "kandinsky_25_percentile": (25, 1.0, 4.0, 0.95),
}
KANDINSKY30 = {"kandinsky30_25": (25, None, 3.0, 0.99), "kandinsky30_50": (50, None, 3.0, 0.99)}


class Analytic:
    """cases.analytic_eps under the U-Net's calling convention."""

    in_layer = SimpleNamespace(in_channels=4)

    def __call__(self, x, t, context, mask):
        return cases.analytic_eps(torch, x, t, context, mask)


def inputs():
    width = cases.UNET["cross_attention_dim"]
    context = torch.from_numpy(normal("samplers.context", (2, TOKENS, width), cases.SEED))
    mask = (torch.arange(TOKENS) < torch.tensor(SEEN)[:, None]).long()
    return context, mask, original.null_embedding()


def guidance_inputs(code, context, mask, null):
    """The unconditional context and mask that text_guidance builds for itself."""
    seen = {}

    def model(x, t, large_context, large_mask):
        seen.update(context=large_context[1:], mask=large_mask[1:])
        return x

    model.in_layer = SimpleNamespace(in_channels=4)
    diffusion = code.diffusion.BaseDiffusion(code.diffusion.get_named_beta_schedule("cosine", 1000))
    x, t = torch.zeros(1, 4, 8, 8), torch.zeros(1)
    diffusion.text_guidance(model, x, t, context, mask, null, 3.0)
    return seen["context"], seen["mask"]


def times(code, steps: int, gan: bool = False) -> list[int]:
    """The time list that the 3.1 pipeline hands to its sampler."""
    seen = {}

    def loop(self, model, shape, times, *_, **__):
        seen["times"] = times
        return torch.zeros(shape)

    fake = mock.Mock(decode=lambda x: x)
    encoder = mock.Mock(return_value=(torch.zeros(1, 2, 48), torch.ones(1, 2)))
    where = dict.fromkeys(("text_encoder", "unet", "movq"), "cpu")
    kinds = dict.fromkeys(where, torch.float32)
    tokens = original.processor(code)
    pipe = code.t2i_pipeline.Kandinsky3T2IPipeline(
        where, kinds, fake, None, tokens, encoder, fake, gan
    )
    with mock.patch.object(code.t2i_pipeline.BaseDiffusion, "p_sample_loop", loop):
        pipe("2", steps=steps, width=64, height=64)
    return seen["times"]


def recorded(diffusion, method: str, latents: list):
    """Patches a step method of a diffusion object so that it appends its results to a list."""
    step = getattr(diffusion, method)

    def wrapper(*args, **kwargs):
        latents.append(step(*args, **kwargs))
        return latents[-1]

    return mock.patch.object(diffusion, method, wrapper)


def stored(case: str, latents: list, settings: dict):
    """The latents after every fifth part of a loop, and after the first and last steps."""
    steps = len(latents)
    keep = sorted({0, steps - 1, *range(0, steps, max(1, steps // 5))})
    arrays = {f"{case}_latents": torch.stack([latents[i] for i in keep])}
    return arrays, {"cases": {case: settings | {"steps": steps, "stored": keep}}}


def run_31(code, queue) -> list:
    """(arrays, meta) of each 3.1 loop and of the schedule."""
    schedule = code.diffusion.get_named_beta_schedule("cosine", 1000)
    lists = {f"times_{n}": np.array(times(code, n)) for n in STEP_COUNTS}
    lists["times_flash"] = np.array(times(code, 50, gan=True))
    lists["alphas_cumprod_1000"] = code.diffusion.BaseDiffusion(schedule).alphas_cumprod
    context, mask, null = inputs()
    lists |= {"context": context, "context_mask": mask, "null_embedding": null}
    runs = [(lists, {"latent_shape": SHAPE})]
    for case, (steps, eta, guidance, percentile) in KANDINSKY.items():
        diffusion = code.diffusion.BaseDiffusion(schedule, percentile)
        when, latents = times(code, steps), []
        queue.put(*cases.noise(case, len(when), SHAPE))
        args = Analytic(), SHAPE, when, "cpu", context, mask, null, guidance, eta
        with recorded(diffusion, "p_sample", latents):
            diffusion.p_sample_loop(*args)
        assert not queue.arrays
        settings = {"eta": eta, "guidance": guidance, "percentile": percentile}
        runs.append(stored(case, latents, settings))

    diffusion, latents = code.diffusion.BaseDiffusion(schedule, 0.99), []
    when = times(code, 4, gan=True)
    queue.put(*cases.noise("flash", len(when), SHAPE))
    with recorded(diffusion, "get_x_start", latents):
        diffusion.p_sample_loop(Analytic(), SHAPE, when, "cpu", context, mask, null, 3.0, gan=True)
    assert not queue.arrays
    return [*runs, stored("flash", latents, {})]


def run_30(code, queue) -> list:
    """(arrays, meta) of each 3.0 loop and of its short schedules."""
    context, mask, null = inputs()
    runs = []
    for case, (steps, _, guidance, percentile) in KANDINSKY30.items():
        schedule = code.diffusion.get_named_beta_schedule("cosine", steps)
        diffusion, latents = code.diffusion.BaseDiffusion(schedule, percentile), []
        queue.put(*cases.noise(case, steps, SHAPE))
        with recorded(diffusion, "p_sample", latents):
            diffusion.p_sample_loop(Analytic(), SHAPE, "cpu", context, mask, null, guidance)
        assert not queue.arrays
        settings = {"guidance": guidance, "percentile": percentile}
        runs.append(stored(case, latents, settings))
        runs.append(({f"alphas_cumprod_{steps}": diffusion.alphas_cumprod}, {}))
    return runs


def merge(runs: list) -> tuple[dict, dict]:
    arrays, meta = {}, {"cases": {}}
    for some, about in runs:
        arrays |= some
        about = dict(about)
        meta["cases"] |= about.pop("cases", {})
        meta |= about
    return arrays, meta
