# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a training run, written while training goes on.

`<run>/checkpoints/<step>/` holds `state` (every array in its dtype, under its dotted path in the
pytree), `position` (JSON) and `metrics`. Orbax writes into a folder with another name and renames
it (in a bucket: marks it as complete at the end), so there are no half-written checkpoints.
"""

import json
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from k3jax.checkpoints.format import as_path
from k3jax.checkpoints.orbax_io import CHUNK_BYTES
from k3jax.files import CheckpointError
from k3jax.training.checkpoint_faults import (
    LOSS,
    DamagedCheckpoint,
    check_space,
    differences,
    loss_of,
    reason_of,
    set_aside,
    set_aside_unreadable_losses,
    silence_orbax,
)
from k3jax.training.signals import agree
from k3jax.training.train_config import CheckpointConfig


FOLDER = "checkpoints"
STATE, POSITION = "state", "position"
CLOCK_EVERY = 10  # steps; comparing the clocks of all processes waits for the devices


class RunCheckpoints:
    """The checkpoints in a run's folder: the newest `keep_last` and the `keep_best` of lowest loss.

    All processes of a job must create this object and call its methods at the same steps. Opening a
    folder removes what a killed process left half-written.
    """

    def __init__(self, folder: epath.PathLike, config: CheckpointConfig):
        """
        Args:
            folder: of the run; its `checkpoints` is created if necessary.

        Raises:
            CheckpointError: no checkpoint of the folder can be read.

        Warns:
            UserWarning: a checkpoint cannot be read, and was moved away.
        """
        self.folder = as_path(folder) / FOLDER
        self._config = config
        best = BestN(get_metric_fn=loss_of, reverse=True, n=config.keep_best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(config.keep_last), best]),
            best_fn=loss_of,
            best_mode="min",
            cleanup_tmp_directories=True,
        )
        set_aside_unreadable_losses(self.folder)
        self._manager = ocp.CheckpointManager(
            self.folder, options=options, handler_registry=_handlers()
        )
        self._end_silence = silence_orbax()
        self._losses = {step: loss_of(self._manager.metrics(step)) for step in self.steps()}
        self._saved_at = time.monotonic()
        self._due: tuple[int, bool] | None = None

    def due(self, step: int) -> bool:
        """Whether this step needs a checkpoint by the settings; the same at every call."""
        if self._due is None or self._due[0] != step:
            due = step % self._config.every == 0
            minutes = self._config.every_minutes
            if minutes is not None and (jax.process_count() == 1 or step % CLOCK_EVERY == 0):
                due = agree(due or time.monotonic() - self._saved_at >= 60 * minutes)
            self._due = step, due
        return self._due[1]

    def save(
        self,
        step: int,
        state: Any,
        position: Mapping[str, Any],
        metric: float | None = None,
        force: bool = False,
    ) -> bool:
        """Starts writing a checkpoint; returns once the arrays are copied to the host.

        From then on `state` may be changed or donated. Waits first for the last checkpoint.

        Args:
            step: not below that of the newest checkpoint.
            state: a pytree of arrays.
            position: the position in the data, and anything else for JSON; the same on all
                processes: only the first one writes it.
            metric: the lower, the better; None or not finite: never among the best.
            force: save although it is not due. A saved step is not written again.

        Returns:
            Whether a checkpoint is being written.

        Raises:
            CheckpointError: this checkpoint or the last one could not be written.
            ValueError: a position that is not JSON, or an earlier step.
        """
        latest = self.latest_step()
        if not (force or self.due(step)) or step == latest:
            return False
        if latest is not None and step < latest:
            raise ValueError(
                f"{self.folder} has a checkpoint of step {latest}, so step {step} cannot be saved "
                "after it: resume from the newest, or use another output folder."
            )
        try:
            position = json.loads(json.dumps(position))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"A checkpoint's position must be what JSON can hold: {error}."
            ) from error
        arrays = _named(state)
        self.wait()
        check_space(self.folder, sum(array.nbytes for array in arrays.values()))
        args = ocp.args.Composite(
            **{
                STATE: ocp.args.PyTreeSave(
                    arrays,
                    save_args={name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in arrays},
                ),
                POSITION: ocp.args.JsonSave(position),
            }
        )
        loss = float(metric) if metric is not None and math.isfinite(metric) else None
        try:
            self._manager.save(step, args=args, metrics={LOSS: loss}, force=True)
        except Exception as error:
            raise self._not_written(error) from error
        self._losses[step] = math.inf if loss is None else loss
        self._saved_at = time.monotonic()
        return True

    def steps(self) -> list[int]:
        """Steps of all checkpoints in order, with the one being written."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """Step of the lowest loss among the checkpoints that are kept; None without any loss."""
        # Of equal ones the newest, which BestN keeps.
        steps = [step for step in self.steps() if self._losses[step] < math.inf]
        return min(steps, key=lambda step: (self._losses[step], -step), default=None)

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint straight into shardings, on this or another mesh, bit for bit.

        Args:
            abstract_state: the state's pytree, of ShapeDtypeStructs; a leaf without sharding goes
                to this process's first device.
            step: the newest by default.

        Returns:
            (state, position)

        Raises:
            CheckpointError: there is no such checkpoint, or it has other arrays.
            DamagedCheckpoint: it cannot be read.
        """
        self.wait()
        step = self.latest_step() if step is None else step
        if step not in self.steps():
            known = ", ".join(map(str, self.steps())) or "none"
            what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            raise CheckpointError(f"{self.folder} has {what}; it has {known}.")
        structs = {name: _placed(leaf) for name, leaf in _named(abstract_state).items()}
        try:
            found = self._manager.item_metadata(step)[STATE]
            if found is None:
                raise FileNotFoundError(f"no metadata in {STATE}")
            faults = differences(dict(found.tree), structs)
            if not faults:
                restore_args = ocp.checkpoint_utils.construct_restore_args(structs)
                args = {
                    STATE: ocp.args.PyTreeRestore(structs, restore_args=restore_args),
                    POSITION: ocp.args.JsonRestore(),
                }
                restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as error:
            raise DamagedCheckpoint(
                f"{self.folder / str(step)} cannot be read ({reason_of(error)}): a file is "
                "missing or damaged; remove that folder to resume from the checkpoint before it."
            ) from error
        if faults:
            raise CheckpointError(
                f"The arrays in {self.folder / str(step)} are not those of this run: "
                f"{'; '.join(faults)}."
            )
        tree = jax.tree.structure(abstract_state)
        return jax.tree.unflatten(tree, [restored[STATE][name] for name in structs]), restored[
            POSITION
        ]

    def restore_newest(self, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """Reads the newest complete checkpoint, as `restore` does.

        Raises:
            CheckpointError: as `restore`; a damaged checkpoint only if there is no other.

        Warns:
            UserWarning: newer ones are damaged, and were moved away.
        """
        while True:
            step, damaged = self.latest_step(), None
            try:
                restored = self.restore(abstract_state, step)
            except DamagedCheckpoint as error:
                damaged = error
            if not agree(damaged is not None):
                return restored
            reason = "by another process" if damaged is None else reason_of(damaged)
            set_aside(self.folder, step, reason, self.steps())
            self._manager.reload()

    def wait(self) -> None:
        """Waits until the checkpoint is on disk and old ones are removed.

        Raises:
            CheckpointError: it could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._not_written(error) from error

    def close(self) -> None:
        """Waits, and ends Orbax's threads. Raises as `wait` does."""
        try:
            self._manager.close()
        except Exception as error:
            raise self._not_written(error) from error
        finally:
            self._end_silence()

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _not_written(self, error: Exception) -> CheckpointError:
        self._end_silence = lambda: None  # Orbax's threads keep failing for a while
        return CheckpointError(
            f"A checkpoint in {self.folder} could not be written ({reason_of(error)}). Earlier "
            "ones are complete, and the same command resumes from the newest."
        )


def _handlers() -> ocp.handlers.DefaultCheckpointHandlerRegistry:
    # float32 weights hardly compress: zstd saves a fifth and takes 2.5 times as long.
    state = ocp.PyTreeCheckpointHandler(use_compression=False)
    position = ocp.JsonCheckpointHandler()
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add(STATE, ocp.args.PyTreeSave, state)
    registry.add(STATE, ocp.args.PyTreeRestore, state)
    registry.add(POSITION, ocp.args.JsonSave, position)
    registry.add(POSITION, ocp.args.JsonRestore, position)
    return registry


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by their dotted path, which is the same for any kind of container."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("Two arrays of the state have the same dotted path; rename one.")
    return named


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
