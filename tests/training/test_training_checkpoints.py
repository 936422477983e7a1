# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: bits, meshes, which ones stay, processes that die, and run.json."""

import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from k3jax.files import CheckpointError
from k3jax.sharding import make_mesh
from k3jax.training.checkpoint_faults import reason_of
from k3jax.training.run_checkpoints import RunCheckpoints
from k3jax.training.train_config import CheckpointConfig


EVERY = CheckpointConfig(every=1, keep_last=2, keep_best=1)
POSITION = {"epoch": 3, "index": 41, "names": ["a", None], "share": 0.25}


class State(NamedTuple):
    step: jax.Array
    weights: dict[str, jax.Array]
    ema: dict[str, jax.Array] | None
    opt_state: optax.OptState


def odd_bits(shape, dtype, seed):
    """Any bits: NaNs with payloads, infinities, denormals, negative zeros."""
    size = np.dtype(dtype).itemsize
    raw = np.random.default_rng(seed).integers(0, 256, (*shape, size), np.uint8)
    return raw.reshape(-1).view(dtype).reshape(shape)


def make_state(mesh):
    def put(array, *names):
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*names)))

    weights = {
        "unet.conv_in.kernel": put(odd_bits((16, 24), np.float32, 0), "fsdp", "tensor"),
        "unet.norm.scale": put(odd_bits((24,), np.float32, 1)),
        "unet.half": put(odd_bits((8, 3), jnp.bfloat16, 2), "fsdp"),
    }
    opt_state = optax.adam(1e-3).init(weights)
    return State(put(np.int32(7)), weights, {k: v + 0 for k, v in weights.items()}, opt_state)


def abstract(state, mesh, *names):
    sharding = NamedSharding(mesh, PartitionSpec(*names))
    copied = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding if x.ndim else copied),
        state,
    )


def all_bytes(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def scalar(value):
    return {"w": jnp.float32(value)}


@pytest.mark.parametrize("target", ["data=8", "fsdp=4,tensor=2", "fsdp=8"])
def test_restores_every_bit_onto_any_mesh(tmp_path, target):
    state = make_state(make_mesh("data=2,fsdp=2,tensor=2"))
    expected = all_bytes(state)
    with RunCheckpoints(tmp_path, EVERY) as checkpoints:
        checkpoints.save(1, state, POSITION, 0.5)
    mesh = make_mesh(target)
    wanted = abstract(state, mesh, ("fsdp",))
    with RunCheckpoints(tmp_path, EVERY) as checkpoints:
        assert checkpoints.latest_step() == checkpoints.best_step() == 1
        restored, position = checkpoints.restore(wanted)
    assert position == POSITION
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert all_bytes(restored) == expected
    for leaf, struct in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
        assert leaf.dtype == struct.dtype and leaf.sharding == struct.sharding


def test_state_may_be_donated_while_it_is_written(tmp_path):
    sharding = NamedSharding(make_mesh("fsdp=8"), PartitionSpec("fsdp"))
    size, dtype = 1 << 22, jnp.float32
    device = jax.jit(lambda: jnp.arange(size, dtype=dtype), out_shardings=sharding)()
    state = {"device": device, "host": np.ones(9, np.float32)}
    update = jax.jit(lambda x: x * 2 + 1, donate_argnums=0).lower(device).compile()
    with RunCheckpoints(tmp_path, EVERY) as checkpoints:
        checkpoints.save(1, state, {})
        jax.block_until_ready(update(device))
        state["host"][:] = 7
        structs = {
            "device": jax.ShapeDtypeStruct((size,), dtype, sharding=sharding),
            "host": jax.ShapeDtypeStruct((9,), dtype),
        }
        restored, _ = checkpoints.restore(structs)
    np.testing.assert_array_equal(restored["device"], np.arange(size, dtype=np.float32))
    np.testing.assert_array_equal(restored["host"], 1)


def test_keeps_the_last_and_the_best(tmp_path):
    losses = {1: 0.9, 2: 0.3, 3: 0.1, 4: float("nan"), 5: None, 6: 0.5, 7: 0.4}
    config = CheckpointConfig(every=1, keep_last=2, keep_best=2)
    with RunCheckpoints(tmp_path, config) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(step, scalar(step), {}, losses[step])
        assert checkpoints.steps() == [2, 3, 4, 5]
    with RunCheckpoints(tmp_path, config) as checkpoints:  # the losses are read again
        for step in (6, 7):
            checkpoints.save(step, scalar(step), {"at": step}, losses[step])
        assert checkpoints.steps() == [2, 3, 6, 7]
        assert (checkpoints.best_step(), checkpoints.latest_step()) == (3, 7)
    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert folders == ["2", "3", "6", "7"]
    with RunCheckpoints(tmp_path, config) as checkpoints:
        state, _ = checkpoints.restore(scalar(0), checkpoints.best_step())
        assert state["w"] == 3
        assert checkpoints.restore(scalar(0))[1] == {"at": 7}


def test_without_losses_only_the_last_stay(tmp_path):
    config = CheckpointConfig(every=1, keep_last=1, keep_best=0)
    with RunCheckpoints(tmp_path, config) as checkpoints:
        for step in range(3):
            checkpoints.save(step, scalar(step), {})
        assert checkpoints.steps() == [2] and checkpoints.best_step() is None


def test_saves_when_it_is_due(tmp_path):
    with RunCheckpoints(tmp_path, CheckpointConfig(every=3, keep_last=9)) as checkpoints:
        saved = [step for step in range(1, 8) if checkpoints.save(step, scalar(step), {})]
        assert saved == [3, 6]
        assert checkpoints.save(7, scalar(7), {}, force=True)
        assert not checkpoints.save(7, scalar(8), {}, force=True)  # it is there
        with pytest.raises(ValueError, match="step 7, so step 4 cannot"):
            checkpoints.save(4, scalar(4), {}, force=True)
        assert checkpoints.restore(scalar(0))[0]["w"] == 7
    minutes = CheckpointConfig(every=1000, every_minutes=10)
    with RunCheckpoints(tmp_path / "minutes", minutes) as checkpoints:
        assert not checkpoints.due(1)
        checkpoints._saved_at -= 600
        assert not checkpoints.due(1)  # the answer that was given
        assert checkpoints.due(2) and checkpoints.save(2, scalar(2), {})
        assert checkpoints.due(2) and not checkpoints.due(3)


def test_refuses_what_cannot_work(tmp_path):
    with RunCheckpoints(tmp_path, EVERY) as checkpoints:
        with pytest.raises(CheckpointError, match="no checkpoint; it has none"):
            checkpoints.restore(scalar(0))
        with pytest.raises(ValueError, match="position must be what JSON can hold"):
            checkpoints.save(1, scalar(1), {"rng": np.zeros(2)})
        checkpoints.save(1, {"w": jnp.zeros((2, 3)), "old": jnp.zeros(1), "h": jnp.zeros(1)}, {})
        with pytest.raises(CheckpointError, match="no checkpoint of step 5; it has 1"):
            checkpoints.restore(scalar(0), 5)
        wrong = {"w": jnp.zeros((3, 2)), "new": jnp.zeros(1), "h": jnp.zeros(1, jnp.bfloat16)}
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(wrong)
        assert "1 missing: new" in str(error.value) and "1 unknown: old" in str(error.value)
        assert "w (float32 (2, 3) instead of float32 (3, 2))" in str(error.value)
        assert "h (float32 (1,) instead of bfloat16 (1,))" in str(error.value)


def test_a_damaged_checkpoint_is_one_sentence(tmp_path):
    with RunCheckpoints(tmp_path, EVERY) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, scalar(step), {})
    for file in (tmp_path / "checkpoints/2/state").glob("**/d/*"):
        file.unlink()
    with RunCheckpoints(tmp_path, EVERY) as checkpoints:
        with pytest.raises(CheckpointError, match=r"2 cannot be read .* remove that folder"):
            checkpoints.restore(scalar(0))
        assert checkpoints.restore(scalar(0), 1)[0]["w"] == 1


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    with RunCheckpoints(folder, EVERY) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, scalar(step), {"at": step}, 0.5)
    return folder


NEEDED = {"metrics/metrics", "position/metadata", "state/_METADATA", "state/manifest.ocdbt"}


def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole(two_checkpoints, tmp_path):
    """Every file of the newest one emptied or removed, one at a time; then all at once."""
    newest = two_checkpoints / "checkpoints" / "2"
    files = [path.relative_to(newest) for path in newest.rglob("*") if path.is_file()]
    assert set(map(str, files)) >= NEEDED
    damages = [("empty", [path]) for path in files] + [("empty", files)]
    damages += [("gone", [path]) for path in files]
    for number, (how, damaged) in enumerate(damages):
        folder = tmp_path / str(number)
        shutil.copytree(two_checkpoints, folder)
        for path in damaged:
            path = folder / "checkpoints" / "2" / path
            path.write_bytes(b"") if how == "empty" else path.unlink()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            with RunCheckpoints(folder, EVERY) as checkpoints:
                state, position = checkpoints.restore_newest(scalar(0))
                step = position["at"]
                assert state["w"] == step
                assert checkpoints.save(3, scalar(3), {"at": 3}, 0.1)  # and can be saved again
        told = [str(one.message) for one in told if "checkpoints" in str(one.message)]
        if step == 2:  # a file that is not read, or not needed
            assert not told and (how == "gone" or not set(map(str, damaged)) & NEEDED), damaged
            continue
        (message,) = told
        assert str(folder / "checkpoints" / "2") in message, message
        assert "resumes from the newest complete one" in message and "Expecting" not in message
        assert (folder / "damaged_checkpoints" / "2").is_dir()
        assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["1", "3"]


@pytest.mark.parametrize("name", ["metrics/metrics", "position/metadata"])
def test_the_only_checkpoint_is_damaged(two_checkpoints, tmp_path, name):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "1")
    (tmp_path / "checkpoints" / "2" / name).write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"2 cannot be read .* to start the run again"
    ) as error:
        with RunCheckpoints(tmp_path, EVERY) as checkpoints:
            checkpoints.restore_newest(scalar(0))
    assert "Expecting" not in str(error.value)
    assert (tmp_path / "checkpoints" / "2").is_dir()


def test_a_checkpoint_that_has_no_room_is_not_begun(tmp_path, monkeypatch):
    state = {"w": jnp.zeros(1000), "b": jnp.zeros(3, jnp.bfloat16)}
    with RunCheckpoints(tmp_path, EVERY) as checkpoints:
        for free, step in ((4005, 1), (4006, 2)):
            usage = type("Usage", (), {"free": free})
            monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
            if free < 4006:
                with pytest.raises(CheckpointError, match=r"needs 4.01e-06 GB, and 4e-06 GB are f"):
                    checkpoints.save(step, state, {})
            else:
                checkpoints.save(step, state, {})
        assert checkpoints.steps() == [2]


def test_the_reason_of_the_system_is_not_cut_off():
    long = f"Error writing {'x' * 400}: No space left on device [source='{'y' * 400}']"
    for error in (ValueError(long), RuntimeError("Orbax")):
        try:
            raise error from (None if isinstance(error, ValueError) else OSError(28, long))
        except Exception as caught:
            assert reason_of(caught) == "No space left on device"
    assert reason_of(ValueError("a" * 200 + "b" * 200)) == f"{'a' * 150} ... {'b' * 150}"


def test_a_full_disk_is_one_sentence_with_its_reason(tmp_path):
    """TensorStore meets a limit of the size of files, which is all that a test can set."""
    code = """
        import resource, signal, sys
        import numpy as np
        from k3jax.training.run_checkpoints import RunCheckpoints
        from k3jax.training.train_config import CheckpointConfig

        state = {"w": np.random.default_rng(0).random(1 << 16)}
        checkpoints = RunCheckpoints(sys.argv[1], CheckpointConfig(every=1))
        checkpoints.save(1, state, {})
        checkpoints.wait()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            checkpoints.save(2, state, {})
            checkpoints.wait()
        except Exception as error:
            print(type(error).__name__, error)
    """
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    assert process.stdout.startswith("CheckpointError A checkpoint in ")
    assert "File too large). Earlier ones are complete" in process.stdout
    with RunCheckpoints(tmp_path, EVERY) as checkpoints:
        assert checkpoints.steps() == [1]
        checkpoints.save(2, scalar(2), {})


KILLED = """
    import os, pathlib, sys, time
    import jax.numpy as jnp
    import numpy as np
    from k3jax.training.run_checkpoints import RunCheckpoints
    from k3jax.training.train_config import CheckpointConfig

    folder = pathlib.Path(sys.argv[1])
    checkpoints = RunCheckpoints(folder, CheckpointConfig(every=1))
    checkpoints.save(1, {"w": jnp.arange(1 << 24)}, {"index": 1}, 0.5)
    checkpoints.wait()
    checkpoints.save(2, {"w": jnp.arange(1 << 24) + 1}, {"index": 2}, 0.1)
    while not list(folder.glob("checkpoints/2.*/state*/**/d/*")):
        time.sleep(0.001)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
def test_killed_while_writing(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == -9, process.stderr
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert len(names) == 2 and "1" in names and "2" not in names, names
    with RunCheckpoints(tmp_path, EVERY) as checkpoints:
        assert checkpoints.steps() == [1]
        struct = {"w": jax.ShapeDtypeStruct((1 << 24,), jnp.int32)}
        state, position = checkpoints.restore(struct)
        assert position == {"index": 1}
        np.testing.assert_array_equal(state["w"], np.arange(1 << 24))
        checkpoints.save(3, scalar(3), {"index": 3}, 0.1)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "3"}


PROCESS = """
    import json
    import pathlib
    import sys
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from k3jax.sharding import make_mesh
    from k3jax.training.run_checkpoints import RunCheckpoints
    from k3jax.training.train_config import CheckpointConfig
    from k3jax.training.run_folder import RunFolder
    from k3jax.training.signals import agree

    rank, address, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.distributed.initialize(address, 2, rank)
    found = {"agree": [agree(rank == 1), agree(False), agree(True)]}
    lock = RunFolder(folder).lock()
    lock.__enter__()  # the first process locks for both
    sharding = NamedSharding(make_mesh("fsdp=8"), PartitionSpec("fsdp"))
    rows = np.arange(16 * 64, dtype=np.float32).reshape(16, 64)
    state = {"w": jax.make_array_from_callback(rows.shape, sharding, lambda i: rows[i])}
    with RunCheckpoints(folder, CheckpointConfig(every=1000, every_minutes=1)) as checkpoints:
        if rank == 1:
            checkpoints._saved_at -= 60  # its clock alone says that it is time
        found["due"] = [step for step in range(6, 14) if checkpoints.due(step)]
        checkpoints.save(10, state, {"index": 10}, 0.5)
        struct = jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=sharding)
        restored, position = checkpoints.restore({"w": struct})
    for shard in restored["w"].addressable_shards:
        assert (np.asarray(shard.data) == rows[shard.index]).all()
    found |= {"shards": len(restored["w"].addressable_shards), "position": position}
    pathlib.Path(sys.argv[4]).write_text(json.dumps(found))  # Gloo's threads print to stdout
"""


@pytest.mark.slow
def test_two_processes_write_one_checkpoint_and_agree(tmp_path):
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    command = [sys.executable, "-c", textwrap.dedent(PROCESS)]
    answers = [tmp_path / f"{rank}.json" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), address, str(tmp_path / "run"), str(answer)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, answer in enumerate(answers)
    ]
    for process, answer in zip(processes, answers, strict=True):
        try:
            _, err = process.communicate(timeout=180)
        finally:
            process.kill()
        assert process.returncode == 0, err
        found = json.loads(answer.read_text())
        assert found.pop("agree") == [True, False, True]
        assert found == {"due": [10], "shards": 4, "position": {"index": 10}}
    sharding = NamedSharding(make_mesh("data=8"), PartitionSpec("data"))
    struct = jax.ShapeDtypeStruct((16, 64), np.float32, sharding=sharding)
    with RunCheckpoints(tmp_path / "run", EVERY) as checkpoints:
        restored, _ = checkpoints.restore({"w": struct})
    np.testing.assert_array_equal(restored["w"].ravel(), np.arange(16 * 64))
