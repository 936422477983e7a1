# SPDX-License-Identifier: Apache-2.0
"""DataConfig -> its source."""

import glob
import os
from typing import get_args

from k3jax.training.data.image_folder import FolderSource
from k3jax.training.data.parquet import ParquetSource
from k3jax.training.data.scene_crops import SceneCropSource
from k3jax.training.data.source import SceneSource, Source
from k3jax.training.data.webdataset import WebDatasetSource
from k3jax.training.train_config import DataConfig, SourceKind


def open_source(config: DataConfig, *, split: str = "train", seed: int = 0) -> Source:
    """The samples that a config names, indexed and checked.

    Args:
        split, seed: of `scenes`.

    Raises:
        ValueError: what is named is not there or not what it should be.
    """
    if config.kind == "scenes":
        if config.crop is not None:
            return SceneCropSource(
                config.num_scenes, config.resolution, config.crop, split, seed, config.scene_mix
            )
        return SceneSource(config.num_scenes, config.resolution, split, seed, config.scene_mix)
    if not config.path:
        raise ValueError(f"data of kind {config.kind} need a `path`.")
    if "://" in config.path:
        raise ValueError(f"{config.path} is not a local path: mount or copy the data first.")
    if config.kind == "folder":
        return FolderSource(config.path, config.caption_column)
    if config.kind == "webdataset":
        return WebDatasetSource(files(config.path, ".tar"), config.caption_column)
    if config.kind == "parquet":
        paths = files(config.path, ".parquet")
        return ParquetSource(paths, config.image_column, config.caption_column)
    kinds = ", ".join(get_args(SourceKind))
    raise ValueError(f"data.kind is {config.kind!r}; it must be one of {kinds}.")


def files(path: str, suffix: str) -> list[str]:
    """The files of a comma-separated list of files, globs and folders, each part sorted.

    Raises:
        ValueError: a part matches nothing.
    """
    found: list[str] = []
    for part in filter(None, (part.strip() for part in path.split(","))):
        pattern = os.path.join(glob.escape(part), f"**/*{suffix}") if os.path.isdir(part) else part
        matches = sorted(
            name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)
        )
        if not matches and os.path.isfile(part):  # a name with brackets in it
            matches = [part]
        if not matches:
            raise ValueError(f"{part}: there is no such file{_inside(part, suffix)}.")
        found += matches
    if not found:
        raise ValueError("the path of the data is empty.")
    return list(dict.fromkeys(found))


def _inside(part: str, suffix: str) -> str:
    return f" and no {suffix} in it" if os.path.isdir(part) else ""
