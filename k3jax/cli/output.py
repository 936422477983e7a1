# SPDX-License-Identifier: Apache-2.0
"""Where the images of a run go, checked before they are made."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from k3jax.images.pngs import file_name


@dataclass(frozen=True)
class PlannedImage:
    path: Path
    prompt: str
    seed: int


def plan(
    prompts: Sequence[str], num_images: int, seed: int, output: str, overwrite: bool
) -> list[PlannedImage]:
    """The images of a run, those of a prompt side by side, the seeds counting up.

    Args:
        output: a folder; or the .png file of a single image.

    Raises:
        ValueError: an image exists and must not be replaced.
    """
    if "://" in output:
        raise ValueError(f"{output} is not on this machine: give a local folder.")
    folder, count = Path(output).expanduser(), len(prompts) * num_images
    if folder.suffix.lower() == ".png" and not folder.is_dir():
        if count > 1:
            raise ValueError(f"{output} is one file, but there are {count} images: give a folder.")
        planned = [PlannedImage(folder, prompts[0], seed)]
    else:
        planned = [
            PlannedImage(folder / file_name(k, seed + k, prompt), prompt, seed + k)
            for k, prompt in enumerate(p for p in prompts for _ in range(num_images))
        ]
    existing = [image.path for image in planned if image.path.exists()]
    if existing and not overwrite:
        more = f" (and {len(existing) - 1} more)" if len(existing) > 1 else ""
        raise ValueError(
            f"{existing[0]} exists already{more}: choose another --output, or --overwrite it."
        )
    return planned


def check_folder(folder: Path) -> None:
    """Makes the folder and tries to write into it.

    Raises:
        ValueError: neither can be done.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--output {folder} cannot be written: {error.strerror}.") from None


def free_path(path: Path) -> Path:
    """`path`, or the first of path_2, path_3, ... that does not exist."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_stem(f"{path.stem}_{number}")
    return free
