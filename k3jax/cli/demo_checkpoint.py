# SPDX-License-Identifier: Apache-2.0
"""The demo checkpoint, written once into the user's cache."""

import fcntl
import hashlib
import json
import shutil
import sys
from pathlib import Path

from k3jax.checkpoint_format import CheckpointError, read_checkpoint
from k3jax.compilation_cache import user_cache
from k3jax.config import ModelConfig, to_dict
from k3jax.run_config import build, collect


def demo_model() -> ModelConfig:
    """The architecture of the demo."""
    return build(collect("tiny")).model


def demo_checkpoint() -> Path:
    """The folder of the demo checkpoint, made by the first process that asks for it.

    Raises:
        ValueError: the cache cannot be written.
    """
    # Another architecture in another version of k3jax is another folder.
    content = json.dumps(to_dict(demo_model()), sort_keys=True)
    folder = user_cache() / f"demo-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_good(folder):
                print(f"k3jax: note: writing the demo checkpoint to {folder}.", file=sys.stderr)
                shutil.rmtree(folder, ignore_errors=True)
                from k3jax.demo import write_demo_checkpoint

                write_demo_checkpoint(folder)
    except OSError as error:
        raise ValueError(
            f"the demo checkpoint cannot be written to {folder} ({error.strerror}): set "
            "XDG_CACHE_HOME to another folder, or give --checkpoint DIR."
        ) from None
    return folder


def _is_good(folder: Path) -> bool:
    try:
        read_checkpoint(folder)
    except CheckpointError:
        return False
    return True
