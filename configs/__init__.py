# SPDX-License-Identifier: Apache-2.0
"""The configs that come with k3jax, in folders by kind; `--config NAME` needs no folder."""

from pathlib import Path


# A config file of a user can import one of these without its folder: k3jax.configs.kandinsky3.
__path__ += [str(file.parent) for file in Path(__file__).parent.glob("*/__init__.py")]
