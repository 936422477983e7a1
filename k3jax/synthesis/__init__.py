# SPDX-License-Identifier: Apache-2.0
"""Data-set synthesis: a file of prompts in, an audited data set out.

prompts -> samples -> shards -> batches -> images -> files
"""
