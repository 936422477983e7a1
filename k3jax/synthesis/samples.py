# SPDX-License-Identifier: Apache-2.0
"""Rows of a prompt file -> samples: what one image of the data set is a function of.

A row gives `images_per_prompt` samples side by side. A sample's place in the data set, and so its
shard, is arithmetic on the row's number; its seed is a hash of the run's seed and its id.
"""

import contextlib
import hashlib
import math
import numbers
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from k3jax.model.tokenizer import check_prompt
from k3jax.pipelines.option_fields import option_fields
from k3jax.pipelines.options import ImageToImageOptions, InpaintOptions
from k3jax.sampling.samplers import steps_of_strength


Operation = Literal["text", "image", "inpaint"]
"""What is done with a sample's inputs: text to image, image to image, or inpainting."""

COLUMNS = (
    *("id", "prompt", "negative_prompt", "seed", "width", "height", "guidance_scale"),
    *("image", "mask", "strength"),
)
MAX_SEED = 2**63 - 1  # what the int64 columns of every reader hold
MAX_SIDE = 1 << 20  # pixels
MAX_ID, MAX_PROMPT = 1000, 100_000  # characters; more is a file of another kind
SAFE = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
KEY_LENGTH = 80  # with an ending, below the 100 bytes of a name in a USTAR archive


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a data set: what it is a function of.

    Attributes:
        index: its place in the data set, from 0.
        line: of the prompt file, from 1.
        seed: None only in a row of a prompt file that names none.
        image, mask: files that it starts from; see input_images.py.
        strength: how much of the image is changed; None without one.
        image_sha256, mask_sha256: of the content of these files, where it is known already.
        fault: why there is no image; then only `index`, `id` and `line` have a meaning.
    """

    index: int
    id: str
    line: int
    prompt: str = ""
    negative_prompt: str | None = None
    seed: int | None = None
    width: int = 0
    height: int = 0
    guidance_scale: float = 0.0
    image: str | None = None
    mask: str | None = None
    strength: float | None = None
    image_sha256: str | None = None
    mask_sha256: str | None = None
    fault: str | None = None

    @property
    def operation(self) -> Operation:
        if self.image is None:
            return "text"
        return "image" if self.mask is None else "inpaint"


@dataclass(frozen=True)
class RowRules:
    """The rules for rows of prompt files, and the values of those that name none.

    Attributes:
        multiple: width and height must be multiples of this many pixels.
        buckets: sizes (width, height); a row gets the nearest one. Empty: its own size.
        steps: of the sampler; a strength runs a part of them.
        strength: of rows with an image that name none; None: 0.3, and 1 where there is a mask.
        masked_only: the checkpoint is an inpainting one.
    """

    run_seed: int
    images_per_prompt: int
    width: int
    height: int
    guidance_scale: float
    negative_prompt: str | None
    multiple: int
    buckets: tuple[tuple[int, int], ...] = ()
    steps: int = 50
    strength: float | None = None
    masked_only: bool = False

    def sample(self, values: Mapping[str, Any], default_id: str, number: int, line: int) -> Sample:
        """Row `number` (from 0) of the prompt files as a sample; see `expand`.

        Raises:
            ValueError: what is wrong with the values, without the file and line.
        """
        prompt = _text(values.get("prompt"), "prompt")
        if not prompt:
            raise ValueError("has no prompt")
        seed = _whole(values.get("seed"), "seed")
        if seed is not None and not 0 <= seed <= MAX_SEED - self.images_per_prompt:
            raise ValueError(f"has the seed {_shown(seed)}; it must be between 0 and 2^63 - 1")
        guidance = _number(values.get("guidance_scale"), "guidance_scale")
        if guidance is not None and (not math.isfinite(guidance) or guidance < 0):
            raise ValueError(f"has the guidance_scale {guidance:g}; it must be 0 or more")
        width, height = self._size(values)
        image, mask, strength = self._image(values)
        return Sample(
            number,
            _identity(values.get("id"), default_id),
            line,
            prompt,
            _text(values.get("negative_prompt"), "negative_prompt") or self.negative_prompt,
            seed,
            width,
            height,
            self.guidance_scale if guidance is None else guidance,
            image,
            mask,
            strength,
        )

    def expand(self, row: Sample) -> Iterator[Sample]:
        """The samples of a row: `images_per_prompt`, side by side, each with its own seed."""
        for k in range(self.images_per_prompt):
            index = row.index * self.images_per_prompt + k
            if row.fault is not None:  # no good row has such an id
                yield replace(row, index=index, id=f"bad:{row.id}-{k}")
                continue
            name = row.id if self.images_per_prompt == 1 else f"{row.id}-{k}"
            seed = derived_seed(self.run_seed, name) if row.seed is None else row.seed + k
            yield replace(row, index=index, id=name, seed=seed)

    def _image(self, values: Mapping[str, Any]) -> tuple[str | None, str | None, float | None]:
        image, mask = (_text(values.get(name), name) or None for name in ("image", "mask"))
        strength = _number(values.get("strength"), "strength")
        if image is None:
            for name, value in (("mask", mask), ("strength", strength)):
                if value is not None:
                    raise ValueError(f"has a {name} but no image")
        if mask is None and self.masked_only:
            raise ValueError("has no mask, which this inpainting checkpoint needs")
        if image is None:
            return None, None, None
        if strength is None:
            strength = self.strength
        if strength is None:
            strength = _default_strength(ImageToImageOptions if mask is None else InpaintOptions)
        try:
            if steps_of_strength(strength, self.steps) == 0 and mask is not None:
                raise ValueError("strength is 0, which repaints nothing: give more.")
        except ValueError as error:
            raise ValueError(f"has an image whose {str(error).removesuffix('.')}") from None
        return image, mask, strength

    def _size(self, values: Mapping[str, Any]) -> tuple[int, int]:
        sizes = [_whole(values.get(name), name) for name in ("width", "height")]
        if sizes == [None, None]:
            return self.width, self.height
        for name, size in zip(("width", "height"), sizes, strict=True):
            if size is None:
                other = "height" if name == "width" else "width"
                raise ValueError(f"has a {other} but no {name}")
            if not 1 <= size <= MAX_SIDE or (size % self.multiple and not self.buckets):
                near = round(min(size, MAX_SIDE) / self.multiple) * self.multiple
                raise ValueError(
                    f"has the {name} {_shown(size)}; it must be a positive multiple of "
                    f"{self.multiple} (the nearest is {max(self.multiple, near)})"
                )
        return nearest_size(self.buckets, *sizes) if self.buckets else (sizes[0], sizes[1])


def _default_strength(options: type) -> float:
    return option_fields(options)["strength"].default


def nearest_size(buckets: tuple[tuple[int, int], ...], width: int, height: int) -> tuple[int, int]:
    """The bucket of the nearest shape and, among equals, of the nearest area."""

    def distance(bucket):
        shape = math.log(bucket[0] / bucket[1]) - math.log(width / height)
        area = math.log(bucket[0] * bucket[1]) - math.log(width * height)
        return round(abs(shape), 9), abs(area), bucket

    return min(buckets, key=distance)


def derived_seed(run_seed: int, sample_id: str) -> int:
    """The seed of a sample, 63 bits of sha256 of the run's seed and the sample's id."""
    digest = hashlib.sha256(f"{run_seed}\0{sample_id}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def key_of(sample_id: str) -> str:
    """An id as a name of files: one to one, ASCII, without dots and slashes, at most 80 bytes.

    Other characters become %XX as in addresses; what is too long is cut and gets a hash.
    """
    key = "".join(chr(b) if b in SAFE else f"%{b:02X}" for b in sample_id.encode())
    if len(key) <= KEY_LENGTH:
        return key
    return f"{key[: KEY_LENGTH - 17]}~{hashlib.sha256(sample_id.encode()).hexdigest()[:16]}"


def _identity(value: Any, default: str) -> str:
    if value is None or value == "":
        return default
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        value = str(int(value))
    text = _text(value, "id")
    if len(text) > MAX_ID:
        raise ValueError(f"has an id of {len(text)} characters; at most {MAX_ID} are allowed")
    if text.startswith("bad:"):
        raise ValueError("has an id that starts with 'bad:', which is kept for bad lines")
    return text


def _text(value: Any, name: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"has the {name} {_shown(value)}; it must be a string")
    if len(value) > MAX_PROMPT:
        raise ValueError(f"has a {name} of {len(value):,} characters; the model sees 128 tokens")
    if not value.isprintable():
        try:
            check_prompt(value, 0)
        except ValueError as error:
            reason = str(error).removeprefix("prompt 0 ").removesuffix(": remove it.")
            raise ValueError(f"has a {name} that {reason}") from None
    return value


def _number(value: Any, name: str) -> float | None:
    if value is None or value == "":
        return None
    if isinstance(value, str | numbers.Real) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    raise ValueError(f"has the {name} {_shown(value)}, which is not a number")


def _whole(value: Any, name: str) -> int | None:
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None  # a missing whole number of a data frame is a NaN
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return int(value)
    raise ValueError(f"has the {name} {_shown(value)}, which is not a whole number")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 150 else f"{text[:150]}..."
