# SPDX-License-Identifier: Apache-2.0
"""Compiled programs kept on disk: only the first run on a machine waits for the compiler."""

import os

from k3jax.files import user_cache


OPT_OUT = "K3JAX_COMPILATION_CACHE"


def enable_compilation_cache() -> str | None:
    """Turns JAX's persistent compilation cache on, unless somebody has decided otherwise.

    A folder that is configured already (also by $JAX_COMPILATION_CACHE_DIR) stays, with its limits.
    K3JAX_COMPILATION_CACHE=0, JAX_ENABLE_COMPILATION_CACHE=0 and a folder that cannot be made
    leave it off.

    Returns:
        The folder, or None where the cache is off.
    """
    import jax

    if os.environ.get(OPT_OUT, "1").lower() in ("0", "false", "off", "no"):
        return None
    if not jax.config.jax_enable_compilation_cache:
        return None
    if jax.config.jax_compilation_cache_dir:
        return jax.config.jax_compilation_cache_dir
    try:
        folder = user_cache() / "xla"
        # Others must not write here: the cache holds code that is run.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return str(folder)
