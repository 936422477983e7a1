# SPDX-License-Identifier: Apache-2.0
"""Noise -> latents: schedules, samplers and the denoising loop."""
