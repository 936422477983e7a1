# SPDX-License-Identifier: Apache-2.0
"""What a test needs and a fresh machine may lack: a browser, linters, a vocabulary.

Without it the test is skipped with the reason. Where K3JAX_REQUIRE_TOOLS=1 it fails instead, so
that .ci/run cannot pass by skipping.
"""

import os
import shutil
import sysconfig
from typing import NoReturn

import pytest


NO_VOCABULARY = "needs the vocabulary of T5: set K3JAX_T5_TOKENIZER to a folder with spiece.model"


def needs_tool(*names: str, install: str) -> str:
    """The path of the first of these programs that exists beside Python or in PATH.

    Args:
        install: the command that installs it, for the reason.
    """
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    found = next(filter(None, (shutil.which(name, path=path) for name in names)), None)
    return found or missing(f"needs {names[0]}: {install}")


def missing(reason: str) -> NoReturn:
    """Skips the running test, or fails it where K3JAX_REQUIRE_TOOLS=1.

    K3JAX_T5_TOKENIZER=none says that this machine has no vocabulary: what needs it is skipped.
    """
    no_vocabulary = reason == NO_VOCABULARY and os.environ.get("K3JAX_T5_TOKENIZER") == "none"
    if os.environ.get("K3JAX_REQUIRE_TOOLS") == "1" and not no_vocabulary:
        pytest.fail(f"K3JAX_REQUIRE_TOOLS=1, and this test {reason}")
    pytest.skip(reason)
