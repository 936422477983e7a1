# SPDX-License-Identifier: Apache-2.0
"""Training: every component, from scratch or from a checkpoint, on any mesh."""
