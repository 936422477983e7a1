# SPDX-License-Identifier: Apache-2.0
"""Kandinsky 3 as in diffusers: its conditioning and its DDPM scheduler.

    k3jax convert kandinsky-community/kandinsky-3 weights/kandinsky3-diffusers \\
        --config kandinsky3_diffusers
    k3jax generate "a corgi in a house made of sushi" --config kandinsky3_diffusers
"""

from k3jax.configs.models.kandinsky3 import get_config as kandinsky3


def get_config():
    config = kandinsky3()
    config.checkpoint = "weights/kandinsky3-diffusers"

    # Padding is zeroed before the projection, and zeros mean "no prompt".
    config.model.conditioning = "diffusers"
    config.model.text_projection.null_embedding = False
    config.model.movq.num_vq_embeddings = 16384  # kept for export, not used to decode

    # The repository's scheduler_config.json; this schedule does not use beta_start and beta_end.
    sampler = config.model.sampler
    sampler.name = "ddpm"
    sampler.num_inference_steps = 25
    sampler.num_train_timesteps = 1000
    sampler.beta_schedule = "squaredcos_cap_v2"
    sampler.beta_start = 0.00085
    sampler.beta_end = 0.012
    sampler.timestep_spacing = "leading"
    sampler.steps_offset = 1
    sampler.prediction_type = "epsilon"
    sampler.variance_type = "fixed_small"
    sampler.clip_sample = True
    sampler.clip_sample_range = 1.0
    sampler.thresholding = False
    sampler.set_alpha_to_one = False
    return config
