# SPDX-License-Identifier: Apache-2.0
"""Which files hold the weights of one model, in the ways that diffusers and transformers write."""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from k3jax.convert.rules import ConversionError


ReadBytes = Callable[[str], bytes]
"""The content of a file, by its name relative to the root."""


@dataclass
class _Files:
    """The weight files of one variant with one extension."""

    single: list[str] = field(default_factory=list)
    shards: dict[int, dict[int, list[str]]] = field(default_factory=dict)
    """Number of shards -> number of the shard -> files."""
    indexes: list[str] = field(default_factory=list)

    @property
    def weights(self) -> list[str]:
        parts = (names for part in self.shards.values() for names in part.values())
        return sorted([*self.single, *(name for names in parts for name in names)])


def weight_files(
    names: Iterable[str],
    folder: str,
    stems: Mapping[str, str],
    where: str,
    weights_variant: str | None = None,
    read_bytes: ReadBytes | None = None,
) -> list[str]:
    """The weight file of a model, or all its shards in order; empty without any.

    Both ways of writing a variant occur: `model.fp16-00001-of-00005.safetensors` and
    `model-00001-of-00005.fp16.safetensors`. safetensors are preferred to pickles. Where there is
    an index, the shards are those that it names.

    Args:
        names: of all files.
        stems: extension -> how the names of the files begin; in the order of preference.
        read_bytes: for the index; None: shards are found by their names alone.

    Raises:
        ConversionError: shards are missing, or there is more than one set of weights.
    """
    names = set(names)
    found = _found(names, folder, stems)
    if weights_variant is None and None not in found and len(found) == 1:
        weights_variant = next(iter(found))
    if weights_variant not in found:
        if not found:
            return []
        have = ", ".join(sorted(v or "plain" for v in found))
        raise ConversionError(
            f"{where}: {folder} has no {weights_variant or 'plain'} weights but {have}; choose "
            "with --weights-variant."
        )
    files = next(found[weights_variant][e] for e in stems if e in found[weights_variant])
    indexed = [] if read_bytes is None else _indexed(files, names, folder, where, read_bytes)
    return indexed or _by_names(files, folder, where)


def _found(names, folder, stems) -> dict[str | None, dict[str, _Files]]:
    """Variant -> extension -> files; only what has weights, or an index of them."""
    found: dict[str | None, dict[str, _Files]] = {}
    for extension, stem in stems.items():
        start = rf"{re.escape(folder + stem)}(?:\.(?P<before>[\w-]+?))?"
        weights = re.compile(
            rf"{start}(?:-(?P<shard>\d+)-of-(?P<shards>\d+))?(?:\.(?P<after>[\w-]+))?\.{extension}"
        )
        index = re.compile(
            rf"{start}\.{extension}(?:\.(?P<middle>[\w-]+))?\.index(?:\.(?P<after>[\w-]+))?\.json"
        )
        for name in sorted(names):
            if match := weights.fullmatch(name):
                files = _files(found, match["before"] or match["after"], extension)
                if match["shard"] is None:
                    files.single.append(name)
                else:
                    shards = files.shards.setdefault(int(match["shards"]), {})
                    shards.setdefault(int(match["shard"]), []).append(name)
            elif match := index.fullmatch(name):
                variant = match["before"] or match["middle"] or match["after"]
                _files(found, variant, extension).indexes.append(name)
    return found


def _files(found, variant, extension) -> _Files:
    return found.setdefault(variant, {}).setdefault(extension, _Files())


def _indexed(files: _Files, names, folder, where, read_bytes) -> list[str]:
    """The shards that an index names; empty without an index, or where its shards are gone."""
    if not files.indexes:
        return []
    (index, *others) = files.indexes
    if others:
        raise ConversionError(
            f"{where} has two indexes of the same weights, {' and '.join(files.indexes)}: remove "
            "the one that does not belong to them."
        )
    shards = [folder + name for name in _shards_of(read_bytes(index), f"{where}: {index}")]
    absent = [name for name in shards if name not in names]
    if len(absent) == len(shards) and files.weights:
        return []
    if absent:
        raise ConversionError(
            f"{where} lacks {', '.join(absent)}, which {index} names; fetch the files again."
        )
    others = [name for name in files.single if name not in shards]
    _refuse_doubles(others, f"the shards of {index}", where)
    return shards


def _shards_of(content: bytes, index: str) -> list[str]:
    try:
        shards = sorted(set(json.loads(content)["weight_map"].values()))
        plain = re.compile(r"[^/\\]+\.(safetensors|bin)")
        if not shards or not all(map(plain.fullmatch, shards)):
            raise ValueError("its weight_map does not name files of weights")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConversionError(f"{index} is damaged ({error!r}): fetch it again.") from None
    return shards


def _by_names(files: _Files, folder, where) -> list[str]:
    """The files, found by their names without an index."""
    if not files.weights:
        raise ConversionError(
            f"{where} has {files.indexes[0]}, but none of the files that it names: fetch them."
        )
    for total, parts in files.shards.items():
        for names in parts.values():
            _refuse_doubles(names[1:], names[0], where)
        _refuse_doubles(files.single, f"{parts[min(parts)][0]} with its {total} shards", where)
    if len(files.shards) > 1:
        totals = " and ".join(str(total) for total in sorted(files.shards))
        raise ConversionError(
            f"{where}: {folder} holds weights in {totals} shards and no index that selects "
            "them: remove the others."
        )
    if files.single:
        return files.single[:1]
    ((total, parts),) = files.shards.items()
    absent = list(itertools.islice((str(i) for i in range(1, total + 1) if i not in parts), 20))
    if absent:
        raise ConversionError(
            f"{where}: {folder} lacks shard {', '.join(absent)} of {total}; fetch it again."
        )
    return [parts[i][0] for i in range(1, total + 1)]


def _refuse_doubles(doubles, other, where) -> None:
    if doubles:
        raise ConversionError(
            f"{where} holds the same weights twice, as {', '.join(doubles)} and as {other}: remove "
            "those that do not belong to the model."
        )
