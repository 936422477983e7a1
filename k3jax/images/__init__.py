# SPDX-License-Identifier: Apache-2.0
"""Pixels and files, without JAX: reading images and masks, sizes, pasting back, PNGs."""

from k3jax.images.pngs import read_settings


__all__ = ["read_settings"]
