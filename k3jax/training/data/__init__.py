# SPDX-License-Identifier: Apache-2.0
"""Training data: sources -> aspect-ratio buckets -> an order of batches -> a loader, or a cache."""
