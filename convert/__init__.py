# SPDX-License-Identifier: Apache-2.0
"""PyTorch checkpoints to ours and back. The only part of k3jax that knows PyTorch."""
