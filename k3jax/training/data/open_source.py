# SPDX-License-Identifier: Apache-2.0
"""Opens the data set that a DataConfig names, and recognises its format."""

import glob
import os
from dataclasses import replace

from k3jax.training.data.image_folder import FolderSource
from k3jax.training.data.parquet import ParquetSource
from k3jax.training.data.source import IMAGE_SUFFIXES, SceneCropSource, SceneSource, Source
from k3jax.training.data.webdataset import WebDatasetSource
from k3jax.training.train_config import DataConfig


ENDINGS = {"webdataset": ".tar", "parquet": ".parquet"}


def open_source(config: DataConfig, *, split: str = "train", seed: int = 0) -> Source:
    """The samples of a data set, indexed and checked.

    Args:
        split, seed: of `scenes`.

    Raises:
        ValueError: the data set does not exist or is damaged.
    """
    config = with_kind(config)
    if config.kind == "scenes":
        args = (config.num_scenes, config.resolution, split, seed, config.scene_mix)
        return SceneSource(*args) if config.crop is None else SceneCropSource(*args, config.crop)
    if not config.path:
        raise ValueError(f"data of kind {config.kind} need a `path` (--data).")
    if "://" in config.path:
        raise ValueError(f"{config.path} is not a local path: mount or copy the data first.")
    if config.kind == "folder":
        return FolderSource(config.path, config.caption_column)
    if config.kind == "webdataset":
        return WebDatasetSource(files(config.path, ".tar"), config.caption_column)
    paths = files(config.path, ".parquet")
    return ParquetSource(paths, config.image_column, config.caption_column)


def with_kind(config: DataConfig) -> DataConfig:
    """The config with the format of its data instead of `auto`.

    Names that end in .tar or .parquet decide; of a folder, those in it, unless it holds images. A
    data set that `k3jax synthesize` wrote is its `data` folder.
    """
    if config.kind != "auto":
        return config
    path = config.path or ""
    if os.path.isfile(os.path.join(path, "manifest.json")):
        if os.path.isdir(data := os.path.join(path, "data")):
            path = data
    kind = "folder"
    for name, ending in ENDINGS.items():
        parts = [part.strip() for part in path.split(",")]
        if any(part.endswith(ending) or _only_in(part, ending) for part in parts):
            kind = name
            break
    return replace(config, kind=kind, path=path or None)


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
            inside = f" and no {suffix} in it" if os.path.isdir(part) else ""
            raise ValueError(f"{part}: there is no such file{inside}.")
        found += matches
    if not found:
        raise ValueError("the path of the data is empty.")
    return list(dict.fromkeys(found))


def _only_in(folder: str, ending: str) -> bool:
    """Whether a folder holds files with this ending, and no images or captions beside them."""
    if not os.path.isdir(folder):
        return False
    names = [entry.name for entry in os.scandir(folder) if entry.is_file()]
    others = (".jsonl", ".csv", *IMAGE_SUFFIXES)
    return any(name.endswith(ending) for name in names) and not any(
        name.lower().endswith(others) for name in names
    )
