# SPDX-License-Identifier: Apache-2.0
"""The weights that come with k3jax: a small model of drawn scenes (configs/models/tiny.py)."""

from pathlib import Path


WEIGHTS = Path(__file__).parents[1] / "weights"
PACKAGED = {"tiny": "text to image", "tiny-inpainting": "inpainting"}
"""Name -> what it does. The weights are in `weights/NAME`."""


DEFAULT = WEIGHTS / "tiny"
"""What commands use that are given no checkpoint."""

INPAINTING = WEIGHTS / "tiny-inpainting"
"""The same for those that paint a part of an image."""


def packaged_path(path) -> Path | None:
    """The folder of a packaged checkpoint, where `path` is the name of one and of nothing else."""
    if str(path) in PACKAGED and not Path(str(path)).exists():
        return WEIGHTS / str(path)
    return None
