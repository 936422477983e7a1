# SPDX-License-Identifier: Apache-2.0
"""The images of a run, batch by batch, each written as soon as it is made."""

import itertools
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import jax
from tqdm import tqdm

import k3jax
from k3jax.checkpoint_format import Checkpoint
from k3jax.cli.output import PlannedImage, free_path
from k3jax.config import to_dict
from k3jax.images import ContactSheet, write_png
from k3jax.pipeline import Kandinsky3Pipeline
from k3jax.run_config import RunConfig
from k3jax.tokenizer import PromptTruncatedWarning
