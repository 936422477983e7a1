# SPDX-License-Identifier: Apache-2.0
"""The folder of a LoRA.

lora.json      rank, alpha, targets, the fingerprint of the base checkpoint
weights.npz    float32, `<layer>.a` (in, rank) and `<layer>.b` (rank, out)
"""

import contextlib
import io
import json
import math
import warnings
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
from etils import epath

from k3jax.checkpoints.digests import abbreviated, array_digest, combined_digest, prove_difference
from k3jax.checkpoints.format import as_path
from k3jax.checkpoints.new_folder import disk_errors, new_folder
from k3jax.config import LoraConfig, from_dict, to_dict
from k3jax.files import KIND_BYTES, CheckpointError, is_local, other_kind, read_object
from k3jax.model.adapters import Weights


SETTINGS, ARRAYS = "lora.json", "weights.npz"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Lora:
    """A LoRA as its folder has it.

    Attributes:
        weights: float32, on the host.
        base_fingerprint: `Checkpoint.fingerprint` of what it was trained on.
    """

    path: epath.Path
    weights: dict[str, dict[str, np.ndarray]]
    config: LoraConfig
    base_fingerprint: str

    @property
    def fingerprint(self) -> str:
        """Digest of the weights: equal for equal arrays, in any folder."""
        return combined_digest(
            {
                f"{name}.{key}": array_digest(array)
                for name, pair in self.weights.items()
                for key, array in pair.items()
            }
        )


def warn_of_another_base(lora: Lora, fingerprint: str | None) -> None:
    """Warns where a LoRA is used on other weights than it was trained on, or may be."""
    if fingerprint is None or lora.base_fingerprint == fingerprint:
        return
    if prove_difference(lora.base_fingerprint, fingerprint):
        found = (
            f"the LoRA {lora.path} was trained on another checkpoint (fingerprint "
            f"{abbreviated(lora.base_fingerprint)}..., not {abbreviated(fingerprint)}...): "
        )
    else:
        found = (
            f"the LoRA {lora.path} may have been trained on another checkpoint (one of the two "
            "fingerprints was computed by an earlier version of k3jax): "
        )
    warnings.warn(f"{found}its effect may be another.", stacklevel=3)


def save_lora(
    path, weights: Weights, config: LoraConfig, base_fingerprint: str, overwrite: bool = False
) -> None:
    """Writes a LoRA's folder, which appears whole or not at all (in a bucket: lora.json is last).

    Args:
        weights: all of them addressable by this process.
        overwrite: replace a LoRA, but no other folder.

    Raises:
        CheckpointError: the destination exists.
    """
    path = as_path(path)
    if path.exists():
        if not (path / SETTINGS).exists():
            if not path.is_dir() or any(path.iterdir()):
                raise CheckpointError(f"{path} exists and is not a LoRA: choose another folder.")
        elif not overwrite:
            raise CheckpointError(
                f"{path} exists already: choose another folder, or ask to overwrite it."
            )
    arrays = {
        f"{name}.{key}": np.asarray(array, np.float32)
        for name, pair in weights.items()
        for key, array in pair.items()
    }
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    settings = {
        "format_version": FORMAT_VERSION,
        "k3jax": version("k3jax"),
        "base_fingerprint": base_fingerprint,
        "lora": to_dict(config),
    }
    files = new_folder(path, overwrite) if is_local(path) else contextlib.nullcontext(path)
    with files as folder, disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SETTINGS).unlink(missing_ok=True)
        (folder / ARRAYS).write_bytes(packed.getvalue())
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


def load_lora(path) -> Lora:
    """Reads a LoRA's folder.

    Raises:
        CheckpointError: not a LoRA, of another format version, or damaged.
    """
    path = as_path(path)
    if not (path / SETTINGS).exists():
        what = f"it has no {SETTINGS}" if path.exists() else "the folder does not exist"
        raise CheckpointError(f"There is no LoRA at {path}: {what}.")
    try:
        settings = read_object(path / SETTINGS)
        if settings.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {settings.get('format_version')!r}, but this k3jax "
                f"reads {FORMAT_VERSION}: upgrade k3jax."
            )
        if not isinstance(settings.get("lora"), dict):
            raise ValueError(f"{path / SETTINGS} is damaged: it has no settings of a LoRA")
        if not isinstance(settings.get("base_fingerprint"), str):
            raise ValueError(f"{path / SETTINGS} is damaged: it has no base_fingerprint")
        config = from_dict(LoraConfig, settings["lora"], where=str(path / SETTINGS))
        alpha = config.rank if config.alpha is None else config.alpha
        if config.rank < 1 or not 0 < alpha < math.inf:
            raise ValueError(
                f"{path / SETTINGS}: rank is {config.rank} and alpha {alpha}; both must be above 0"
            )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{str(error).rstrip('.')}; copy the LoRA again.") from None
    weights = _read_weights(path)
    for layer, pair in weights.items():
        if pair.keys() != {"a", "b"} or any(x.ndim != 2 for x in pair.values()):
            raise CheckpointError(f"The LoRA {path} is damaged: {layer} is not a pair a, b.")
        ranks = {pair["a"].shape[1], pair["b"].shape[0], config.rank}
        if ranks != {config.rank}:
            raise CheckpointError(
                f"The LoRA {path} is damaged: {layer} has rank {pair['a'].shape[1]} and "
                f"{pair['b'].shape[0]}, but {SETTINGS} has rank {config.rank}."
            )
        if not all(np.isfinite(x).all() for x in pair.values()):
            raise CheckpointError(
                f"The LoRA {path} has NaN or infinite values in {layer}: train it again."
            )
    return Lora(path, weights, config, settings["base_fingerprint"])


def _read_weights(path: epath.Path) -> dict[str, dict[str, np.ndarray]]:
    """Layer -> name -> array of a LoRA's folder."""
    weights: dict[str, dict[str, np.ndarray]] = {}
    try:
        content = (path / ARRAYS).read_bytes()
        if kind := other_kind(content[:KIND_BYTES], zipped=True):
            raise CheckpointError(f"{path / ARRAYS} {kind}.")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            for name in arrays.files:  # the zip file checks the CRC-32 of each
                layer, _, key = name.rpartition(".")
                weights.setdefault(layer, {})[key] = _float32(arrays[name], name)
    except CheckpointError:
        raise
    except Exception as error:  # of damaged bytes zipfile and NumPy raise nearly everything
        raise CheckpointError(
            f"{path / ARRAYS} is damaged ({str(error)[:200] or type(error).__name__}); copy the "
            "LoRA again."
        ) from None
    if not weights:
        raise CheckpointError(f"{path / ARRAYS} is damaged: it holds no weights.")
    return weights


def _float32(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype != np.float32:
        raise ValueError(f"{name} is {array.dtype}, not float32")
    return array
