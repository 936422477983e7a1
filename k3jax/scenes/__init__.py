# SPDX-License-Identifier: Apache-2.0
"""Pictures of coloured shapes with captions: a small model's training data, and its checker."""
