# SPDX-License-Identifier: Apache-2.0
"""Importing k3jax changes nothing but sys.modules."""

import subprocess
import sys


PROGRAM = '''
import ast, asyncio, contextlib, importlib, inspect, logging, os, pkgutil, signal, sys
import threading, time, warnings

import jax, numpy as np
import k3jax

assert k3jax.__all__ and not [name for name in sys.modules if name.startswith("k3jax.")]
spec = importlib.util.find_spec


def modules(package):
    """Names of all modules below a package, without importing them."""
    for folder in spec(package).submodule_search_locations:
        for info in pkgutil.iter_modules([folder], f"{package}."):
            yield info.name
            if info.ispkg:
                yield from modules(info.name)


def needed(name):
    """What a module imports from elsewhere when it is imported."""
    with open(spec(name).origin) as file:
        body = ast.parse(file.read()).body
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def state():
    return {
        "jax.config": dict(jax.config.values),
        "sys.meta_path": list(sys.meta_path),
        "sys.path": list(sys.path),
        "hooks": (sys.excepthook, sys.unraisablehook, sys.displayhook, threading.excepthook),
        "warnings": list(warnings.filters),
        "signals": [signal.getsignal(number) for number in signal.valid_signals()],
        "asyncio": asyncio.get_event_loop_policy(),
        "environment": dict(os.environ),
        "logging": (logging.root.level, list(logging.root.handlers)),
        "numpy": np.geterr(),
        "threads": len(threading.enumerate()),
    }


names = sorted(modules("k3jax"))
for name in sorted({other for name in names for other in needed(name)}):
    if name.partition(".")[0] != "k3jax":
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
before = state()
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
after = state()
changed = {key for key in before if before[key] != after[key]}
assert len(names) > 150 and not changed, changed
'''


def test_imports_change_no_global_state():
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
