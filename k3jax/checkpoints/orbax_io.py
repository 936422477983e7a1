# SPDX-License-Identifier: Apache-2.0
"""The only file that knows Orbax.

Orbax's v1 API is experimental, so it is used here alone, for dictionaries of arrays with dotted
names: {"layers.0.attention.q.kernel": array}.
"""

import contextlib
import ctypes
import gc
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from etils import epath

from k3jax.files import CheckpointError, is_local, shortened


# A process reads whole chunks, so small ones let it read little more than its own shards; Orbax's
# default is one chunk per array, and every process would read all of it.
CHUNK_BYTES = 4 << 20
READ_BYTES = 512 << 20  # host memory for reads in flight


@contextlib.contextmanager
def saving(folder: epath.Path, arrays: Mapping[str, np.ndarray], compressed: bool = False):
    """Adds arrays to an unfinished folder while the body of the `with` runs.

    They must be contiguous, are not copied, and must not change meanwhile.
    """

    def start():
        with _context({jax.process_index()}, compressed=compressed):
            return ocp.partial.save_async(folder, _nested(arrays))

    def wait():
        response.result()
        # Each save reads and merges what all saves before it left, which took half a minute for
        # 60 saves of 1,000 arrays. Names are unique here, so what is finished is put out of sight.
        if is_local(folder):
            _move_all(_beside(folder, ".partial_save"), _beside(folder, ".saved"))

    logs = [logging.getLogger(name) for name in ("absl", "asyncio")]
    for log in logs:
        log.addFilter(_is_news)
    try:
        response = _write(folder, start)
        yield
        _write(folder, wait)
    finally:
        for log in logs:
            log.removeFilter(_is_news)
    _give_memory_back()


def _is_news(record: logging.LogRecord) -> bool:
    """Not the tracebacks of Orbax's threads and tasks, whose errors `saving` raises."""
    echoes = ("_SignalingThread.run() raised", "exception was never retrieved")
    return not any(echo in record.getMessage() for echo in echoes)


def finish(folder: epath.Path) -> None:
    """Makes what `saving` wrote readable, by a rename."""

    def rename():
        if is_local(folder):
            _move_all(_beside(folder, ".saved"), _beside(folder, ".partial_save"))
            _beside(folder, ".saved").rmdir()
        with _context({jax.process_index()}):
            ocp.partial.finalize(folder)

    _write(folder, rename)


def array_structs(folder: epath.Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Name -> shape and dtype of every array in a folder, sorted by name."""
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for name, leaf in sorted(_metadata(folder).items())
    }


def load_arrays(
    folder: epath.Path, structs: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Reads some arrays of a folder, into the dtypes and shardings of `structs`.

    Every process that has a device in the shardings must call this with the same names.

    Args:
        structs: ShapeDtypeStructs with shardings.

    Raises:
        CheckpointError: the files cannot be read.
    """
    processes, largest = {jax.process_index()}, 0
    for struct in structs.values():
        processes |= {device.process_index for device in struct.sharding.device_set}
        shard = math.prod(struct.sharding.shard_shape(struct.shape))
        largest = max(largest, shard * max(4, struct.dtype.itemsize))

    def read():
        arrays = _flat(ocp.load(folder, _nested(structs)))
        # With partial_load a missing array comes back as the struct, without an error.
        lost = [name for name in structs if not isinstance(arrays.get(name), jax.Array)]
        if lost:
            raise ValueError(f"it does not hold {shortened(lost)}")
        return {name: arrays[name] for name in structs}

    try:
        # A limit below one shard is an error in Orbax, not a slow-down.
        return _read(folder, processes, read, max(READ_BYTES, 2 * largest))
    finally:
        _give_memory_back()


def iterate_arrays(folder: epath.Path, batch_bytes: int) -> Iterator[tuple[str, np.ndarray]]:
    """Reads all arrays as NumPy, in the order of their names, about `batch_bytes` at a time."""
    batch, size = {}, 0
    for name, leaf in sorted(_metadata(folder).items()):
        batch[name] = leaf
        size += math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        if size >= batch_bytes:
            yield from _load_numpy(folder, batch)
            batch, size = {}, 0
    if batch:
        yield from _load_numpy(folder, batch)


def _load_numpy(folder, batch):
    def read():
        arrays = _flat(ocp.load(folder, _nested(batch)))
        lost = [name for name in batch if not isinstance(arrays.get(name), np.ndarray)]
        if lost:
            raise ValueError(f"it does not hold {shortened(lost)}")
        return arrays

    arrays = _read(folder, {jax.process_index()}, read)
    while arrays:
        name = next(iter(arrays))
        yield name, arrays.pop(name)


def _give_memory_back() -> None:
    """Returns freed memory to the system.

    The chunks are freed in TensorStore's many threads, each with a heap of its own, and glibc keeps
    them all: without this a process held 4.6 GB after restoring 2.2 GB onto 8 devices.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc only
        trim(0)


def _beside(folder: epath.Path, suffix: str) -> epath.Path:
    return folder.parent / f"{folder.name}{suffix}"


def _move_all(source: epath.Path, target: epath.Path) -> None:
    target.mkdir(exist_ok=True)
    for child in source.iterdir():
        child.rename(target / child.name)


def _metadata(folder: epath.Path) -> dict[str, object]:
    def read():
        leaves = _flat(ocp.metadata(folder).metadata)
        for leaf in leaves.values():
            jax.ShapeDtypeStruct(leaf.shape, np.dtype(leaf.dtype))
            math.prod(leaf.shape)
        return leaves

    return _read(folder, {jax.process_index()}, read)


@contextlib.contextmanager
def _context(processes: set[int], read_bytes: int | None = None, compressed: bool = False):
    context = ocp.Context()
    context.array.saving.use_compression = compressed
    context.memory.deepcopy_host_arrays = False
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    context.memory.read_concurrent_bytes = read_bytes
    context.pytree.loading.partial_load = True
    if jax.process_count() > 1:
        # Processes that hold none of the arrays are not waited for.
        context.multiprocessing.active_processes = processes
        context.multiprocessing.primary_host = min(processes)
    with context:
        yield


def _read(folder: epath.Path, processes: set[int], read: Callable, read_bytes: int | None = None):
    """Calls `read` in a context, and makes one sentence of whatever Orbax raises."""

    def in_context():
        with _context(processes, read_bytes):
            return read()

    return _call(
        in_context,
        f"{folder} cannot be read ({{}}): a file is missing or damaged; "
        "copy or convert the checkpoint again.",
    )


def _write(folder: epath.Path, write: Callable):
    """Calls `write`, and makes one sentence of whatever Orbax raises."""
    return _call(write, f"{folder} cannot be written: {{}}.")


def _call(function: Callable, sentence: str):
    """Calls a function of Orbax; raises a CheckpointError of `sentence`, with the reason in it.

    After the first failure others follow in TensorStore's threads and in abandoned coroutines;
    asyncio and the interpreter would report them in hundreds of lines.
    """
    log, hook, unraisable = logging.getLogger("asyncio"), sys.unraisablehook, []
    level = log.level
    sys.unraisablehook = unraisable.append
    try:
        try:
            return function()
        except Exception as error:
            message = _first_line(error)
        log.setLevel(logging.CRITICAL + 1)
        time.sleep(0.5)  # until the reads and writes under way have failed too
        gc.collect()
        unraisable.clear()
    finally:
        log.setLevel(level)
        sys.unraisablehook = hook
        for other in unraisable:
            hook(other)
    raise CheckpointError(sentence.format(message))


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:  # TensorStore's message
        error = error.__cause__
    operating_system = re.search(r"([^:]+) \[os_error_code=", str(error))
    if operating_system is not None:
        return operating_system[1].strip()
    text = str(error).partition(" [")[0].partition(" See full ")[0].strip()
    return text.splitlines()[0].rstrip(".")[:400] if text else type(error).__name__


def _nested(leaves: Mapping[str, object]) -> dict:
    tree = {}
    for name, leaf in leaves.items():
        *parents, last = name.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def _flat(tree: Mapping, prefix: str = "") -> dict[str, object]:
    leaves = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves.update(_flat(value, f"{prefix}{key}."))
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
