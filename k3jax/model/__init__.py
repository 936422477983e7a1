# SPDX-License-Identifier: Apache-2.0
"""The networks: modules and pure functions; no files, no loops."""
