# SPDX-License-Identifier: Apache-2.0
"""The public API: prompt -> tokens -> context -> latents -> image."""
