# SPDX-License-Identifier: Apache-2.0
"""Where a data set lies: a local folder, or an address that fsspec knows (gs://, s3://, ...)."""

from k3jax.synthesis.files import is_remote
from k3jax.synthesis.local_store import LocalStore
from k3jax.synthesis.remote_store import RemoteStore


Store = LocalStore | RemoteStore


def store_at(path: str) -> Store:
    return RemoteStore(path) if is_remote(path) else LocalStore(path)


def read_bytes(store: Store, name: str) -> bytes:
    with store.open(name) as file:
        return file.read()


def write_bytes(store: Store, name: str, content: bytes) -> None:
    with store.create(name) as file:
        file.write(content)
