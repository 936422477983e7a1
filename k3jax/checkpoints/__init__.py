# SPDX-License-Identifier: Apache-2.0
"""Weights on disk: the format, reading, writing, digests and cards."""
