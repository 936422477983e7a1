# SPDX-License-Identifier: Apache-2.0
"""Kandinsky 3.1 Flash: four steps and no guidance, distilled from the base model.

    k3jax convert ai-forever/Kandinsky3.1 weights/flash --config flash \\
        --text-encoder-from weights/kandinsky3
    k3jax generate "a corgi in a house made of sushi" --config flash
"""

from k3jax.configs.models.kandinsky3 import get_config as kandinsky3


def get_config():
    config = kandinsky3()
    config.checkpoint = "weights/flash"
    config.convert.variant = "flash"

    config.model.sampler.name = "flash"
    config.model.sampler.num_inference_steps = 4
    config.model.sampler.guidance_scale = 0.0
    return config
