# SPDX-License-Identifier: Apache-2.0
"""Config files: Python files with a function get_config() that returns a ConfigDict.

Those that come with k3jax are in configs/, in folders by kind; `--config NAME` needs no folder.
"""

import importlib.util
from pathlib import Path
from typing import Any

from k3jax.config import suggestion


def config_names() -> list[str]:
    """The configs that come with k3jax."""
    return sorted(_configs())


def load_config(name: str) -> dict[str, Any]:
    """The values of a config file as nested dicts.

    Args:
        name: of one of k3jax.configs, or the path of a .py file.

    Raises:
        ValueError: no such config (with the nearest), or one without a get_config() that works.
    """
    configs = _configs()
    if name.endswith(".py") or "/" in name:
        path = Path(name).expanduser()
        if not path.is_file():
            raise ValueError(f"the config file {name} does not exist.")
    elif name in configs:
        path = configs[name]
    else:
        raise ValueError(
            f"there is no config {name!r}{suggestion(name, set(configs))}; "
            "a file of your own ends in .py."
        )
    spec = importlib.util.spec_from_file_location(f"k3jax_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
        return config.to_dict() if hasattr(config, "to_dict") else dict(config)
    except Exception as error:
        raise ValueError(
            f"{path}: get_config() cannot be run ({type(error).__name__}: {error})."
        ) from error


def _configs() -> dict[str, Path]:
    """Name -> file of the configs that come with k3jax."""
    from k3jax import configs

    files = Path(configs.__file__).parent.glob("*/*.py")
    return {file.stem: file for file in files if file.stem != "__init__"}
