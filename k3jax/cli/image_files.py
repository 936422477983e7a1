# SPDX-License-Identifier: Apache-2.0
"""The PNG files of a run: their names, checked before the run, and their contact sheet."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from k3jax.images.pngs import ContactSheet, file_name, write_png


@dataclass(frozen=True)
class PlannedImage:
    """An image that a run will write.

    Attributes:
        input: the number of its prompt, or of its pair of prompt and image.
    """

    path: Path
    prompt: str
    seed: int
    input: int

    @property
    def caption(self) -> str:
        """Its text in a contact sheet."""
        return f"{self.path.name.split('_')[0]} seed {self.seed} {self.prompt}"


def plan_images(
    prompts: Sequence[str], num_images: int, seed: int, output: str, overwrite: bool
) -> list[PlannedImage]:
    """The images of a run: `num_images` for each prompt, with consecutive seeds.

    Creates the folder, and tries to write into it.

    Args:
        output: a folder; or, for a single image, a .png file.

    Raises:
        ValueError: an image exists and `overwrite` is False, or the folder cannot be written.
    """
    if "://" in output:
        raise ValueError(f"{output} is not on this machine: give a local folder.")
    folder, count = Path(output).expanduser(), len(prompts) * num_images
    inputs = [(number, prompt) for number, prompt in enumerate(prompts) for _ in range(num_images)]
    paths = [folder / file_name(k, seed + k, prompt) for k, (_, prompt) in enumerate(inputs)]
    if folder.suffix.lower() == ".png" and not folder.is_dir():
        if count > 1:
            raise ValueError(f"{output} is one file, but there are {count} images: give a folder.")
        paths, folder = [folder], folder.parent
    existing = [path for path in paths if path.exists()]
    if existing and not overwrite:
        more = f" (and {len(existing) - 1} more)" if len(existing) > 1 else ""
        raise ValueError(
            f"{existing[0]} exists already{more}: choose another --output, or --overwrite it."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--output {folder} cannot be written: {error.strerror}.") from None
    pairs = zip(paths, inputs, strict=True)
    return [
        PlannedImage(path, prompt, seed + k, number)
        for k, (path, (number, prompt)) in enumerate(pairs)
    ]


def write_contact_sheet(
    folder: Path, cells: Sequence[tuple[Image.Image, str]], multiple: int = 1
) -> Path:
    """Writes contact_sheet.png, or contact_sheet_2.png, ... if that exists.

    Args:
        cells: images of one size, with captions.
        multiple: the number of columns is a multiple of it.
    """
    sheet = ContactSheet(len(cells), *cells[0][0].size, multiple)
    for image, caption in cells:
        sheet.add(image, caption)
    path, number = folder / "contact_sheet.png", 1
    while path.exists():
        number += 1
        path = folder / f"contact_sheet_{number}.png"
    write_png(sheet.image(), path)
    return path
