# SPDX-License-Identifier: Apache-2.0
"""Kandinsky 3.0, text to image: the architecture of 3.1, other weights and another sampler.

k3jax convert ai-forever/Kandinsky3.0 weights/kandinsky30 --config kandinsky30
k3jax generate "a corgi in a house made of sushi" --config kandinsky30
"""

from k3jax.configs.models.kandinsky3 import get_config as kandinsky3


def get_config():
    config = kandinsky3()
    config.checkpoint = "weights/kandinsky30"
    config.model.sampler.name = "kandinsky30"  # the short DDPM chain of that release
    return config
