# SPDX-License-Identifier: Apache-2.0
"""A small checkpoint, and a cache of its own for what is remembered of checked files."""

import pytest

from checkpoints import write


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def ckpt(tmp_path):
    return write(tmp_path / "ckpt")
