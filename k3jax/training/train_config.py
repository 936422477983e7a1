# SPDX-License-Identifier: Apache-2.0
"""The settings of a training run: the `train` part of a config file, as frozen dataclasses.

Each field has its help and, if it is a number, its limits. What depends on several settings, on the
checkpoint or on the data is checked by the code that uses it. `configs/` has one file per task.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from k3jax.config import LoraConfig, from_dict, to_dict


@dataclass(frozen=True)
class Limit:
    """An interval of finite numbers, and the check that a number is in it.

    Attributes:
        low, high: the ends; None: no end.
        open_low, open_high: whether the interval excludes that end.
    """

    low: float
    high: float | None = None
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        high = math.inf if self.high is None else self.high
        below = value < high if self.open_high else value <= high
        return math.isfinite(value) and above and below

    def __call__(self, value: float, name: str) -> float:
        """The value itself.

        Raises:
            ValueError: it is outside the limits; `name` is the setting.
        """
        if value not in self:
            finite = "" if math.isfinite(value) else "finite and "
            raise ValueError(f"{name} is {value}; it must be {finite}{self}.")
        return value

    def __str__(self) -> str:
        low = f"more than {self.low}" if self.open_low else f"{self.low} or more"
        if self.high is None:
            return low
        return f"{low}, and {'less than' if self.open_high else 'at most'} {self.high}"


POSITIVE = Limit(0, open_low=True)
NOT_NEGATIVE = Limit(0)
COUNT = Limit(1)
SHARE = Limit(0, 1)
DECAY = Limit(0, 1, open_high=True)
SEED = Limit(0, 2**32 - 1)  # JAX's keys repeat from there on


def setting(default: Any, help: str, check: Limit | None = None) -> Any:
    """A dataclass field with its help and, if it is a number, its limits in `metadata`."""
    return field(default=default, metadata={"help": help, "check": check})


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser.

    AdamW (arXiv:1711.05101); Adafactor (arXiv:1804.04235) where memory is short; Muon
    (arXiv:2502.16982, with updates of Adam's size) for a U-Net from scratch in fewer steps.
    """

    name: Literal["adamw", "adafactor", "muon"] = setting("adamw", "optimiser")
    learning_rate: float = setting(1e-4, "learning rate after the warm-up", POSITIVE)
    schedule: Literal["constant", "cosine"] = setting(
        "constant", "after the warm-up; cosine falls to final_learning_rate at the last step"
    )
    final_learning_rate: float = setting(0.0, "learning rate at the end of a cosine", NOT_NEGATIVE)
    warmup_steps: int = setting(1000, "steps in which the learning rate grows from 0", NOT_NEGATIVE)
    weight_decay: float = setting(
        0.01,
        "decay of kernels, token embeddings and LoRA factors; biases and norm scales have none",
        NOT_NEGATIVE,
    )
    b1: float = setting(0.9, "decay of Adam's first moment", DECAY)
    b2: float = setting(0.999, "decay of Adam's second moment", DECAY)
    eps: float = setting(1e-8, "Adam's epsilon", POSITIVE)
    max_grad_norm: float | None = setting(
        1.0, "clip gradients to this global norm; None: no clipping", POSITIVE
    )
    gradient_accumulation_steps: int = setting(
        1, "parts of a batch whose gradients are averaged before one update", COUNT
    )


@dataclass(frozen=True)
class LossConfig:
    """The loss of the tasks that train a U-Net."""

    snr_gamma: float | None = setting(
        None,
        "min-SNR weighting (arXiv:2303.09556), usually 5; None: every timestep weighs 1",
        POSITIVE,
    )
    layout_weight: float | None = setting(
        None, "largest weight of errors at high noise, which decide the layout; None: all 1", COUNT
    )
    timesteps: tuple[int, int] = setting(
        (0, 1000), "first timestep, and the one after the last; (600, 970) trains the layout only"
    )
    caption_dropout: float = setting(
        0.1, "share of samples trained on the checkpoint's own unconditional input", SHARE
    )


@dataclass(frozen=True)
class DataConfig:
    """The images and captions."""

    kind: Literal["auto", "folder", "webdataset", "parquet", "scenes"] = setting(
        "auto", "format of the data; auto: recognised from `path`"
    )
    path: str | None = setting(
        None, "folder, or comma-separated tars, Parquet files or globs; `scenes` needs none"
    )
    caption_column: str = setting("caption", "column or JSON field of captions; else `prompt`")
    image_column: str = setting("image", "column of images in Parquet files")
    resolution: int = setting(
        1024, "side of the square whose area no bucket of sizes exceeds", COUNT
    )
    aspect_buckets: bool = setting(
        True, "sort images into buckets by aspect ratio; False: square centre crops"
    )
    cache: str | None = setting(
        None,
        "folder for latents and text embeddings, computed once per data set; None: every time",
    )
    num_workers: int = setting(
        0, "processes that read and decode images; 0: threads of this process", NOT_NEGATIVE
    )
    shuffle: bool = setting(True, "a new random order in every epoch")
    num_scenes: int = setting(
        100_000, "number of different scenes drawn by `scenes`; finite, to cache latents", COUNT
    )
    scene_mix: Literal["all", "places", "pairs", "several"] = setting(
        "all",
        "captions of `scenes`: all; places: those that name a position or relation; pairs: mostly "
        "two objects; several: mostly two to four",
    )
    crop: int | None = setting(
        None, "side of the crop around an object that `scenes` gives to an autoencoder", COUNT
    )


@dataclass(frozen=True)
class MaskConfig:
    """Shares of the kinds of inpainting masks; they need not add up to 1."""

    boxes: float = setting(0.5, "share of masks of boxes", NOT_NEGATIVE)
    strokes: float = setting(0.35, "share of masks of brush strokes", NOT_NEGATIVE)
    whole: float = setting(0.15, "share of masks of the whole image", NOT_NEGATIVE)
    objects: float = setting(
        0.0, "share of masks of an object's box, with data of kind `scenes` only", NOT_NEGATIVE
    )


@dataclass(frozen=True)
class PriorConfig:
    """Prior preservation of DreamBooth (arXiv:2208.12242): images of the class in every batch."""

    path: str = field(
        metadata={"help": "folder of class images with captions, as `k3jax generate` writes"}
    )
    weight: float = setting(1.0, "weight of the class images' loss", NOT_NEGATIVE)
    share: float = setting(
        0.5,
        "share of a batch that is class images",
        Limit(0, 1, open_low=True, open_high=True),
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and how many are kept."""

    every: int = setting(1000, "steps between checkpoints", COUNT)
    keep_last: int = setting(2, "newest checkpoints that are kept", COUNT)
    keep_best: int = setting(
        1,
        "best checkpoints that are kept, by validation loss, else by smoothed training loss",
        NOT_NEGATIVE,
    )
    every_minutes: float | None = setting(
        None, "write a checkpoint after so many minutes too; for preemptible machines", POSITIVE
    )


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    task: str = setting("text_to_image", "what is trained: a key of `k3jax.training.tasks.TASKS`")
    output: str = setting("train", "folder of the run; an existing run is resumed")
    from_scratch: bool = setting(False, "random weights for the trained components")
    components: tuple[str, ...] = setting(
        ("text_projection", "unet"),
        "components that are trained, by their names in `k3jax.config.COMPONENTS`",
    )
    decoder_only: bool = setting(
        False, "of `movq`: keep the encoder, so that U-Nets trained on its latents stay valid"
    )
    steps: int = setting(10_000, "updates in total", COUNT)
    batch_size: int = setting(
        32, "samples per update over the whole mesh, gradient accumulation included", COUNT
    )
    seed: int = setting(0, "seed of weights, order, noise and dropout", SEED)
    dtype: Literal["bfloat16", "float32"] = setting(
        "bfloat16", "dtype of the computation; trained weights are float32"
    )
    frozen_dtype: Literal["bfloat16", "float32"] = setting("bfloat16", "dtype of frozen weights")
    remat: bool = setting(True, "recompute the blocks' activations in the backward pass")
    ema_decay: float | None = setting(0.9999, "decay of the moving average; None: none", DECAY)
    log_every: int = setting(10, "steps between lines of metrics", COUNT)
    sample_every: int = setting(1000, "steps between sample grids; 0: none", NOT_NEGATIVE)
    sample_prompts: tuple[str, ...] = setting((), "prompts of the sample grids")
    stages: tuple[str, ...] = setting(
        (), "names of configs to train one after the other instead of this one"
    )
    validation_batches: int = setting(
        0, "held-out batches for the validation loss at every checkpoint", NOT_NEGATIVE
    )
    optimizer: OptimizerConfig = field(
        default_factory=OptimizerConfig, metadata={"help": "the optimiser"}
    )
    loss: LossConfig = field(default_factory=LossConfig, metadata={"help": "the loss"})
    data: DataConfig = field(
        default_factory=DataConfig, metadata={"help": "the images and captions"}
    )
    lora: LoraConfig | None = field(
        default=None,
        metadata={
            "help": "train low-rank updates only; None: the components",
            "check": {"rank": COUNT, "alpha": POSITIVE},
        },
    )
    masks: MaskConfig = field(
        default_factory=MaskConfig, metadata={"help": "the masks of inpainting"}
    )
    prior: PriorConfig | None = field(
        default=None, metadata={"help": "prior preservation; None: none"}
    )
    checkpoint: CheckpointConfig = field(
        default_factory=CheckpointConfig, metadata={"help": "the checkpoints of the run"}
    )


def checked(config: TrainConfig) -> TrainConfig:
    """The config itself; every setting has its type and is within its limits.

    Raises:
        ValueError: the first setting that is wrong, with its name and limits.
    """
    config = from_dict(TrainConfig, to_dict(config), "train")
    _check_limits(config, "train")
    if not config.output:
        raise ValueError("train.output (--output) is empty: name a folder for the run.")
    return config


def _check_limits(group: Any, where: str, limits: Mapping[str, Limit] | None = None) -> None:
    """Checks the numbers of a group of settings; `limits` are those of a group without metadata."""
    for part in dataclasses.fields(group):
        name, value = f"{where}.{part.name}", getattr(group, part.name)
        check = part.metadata.get("check") if limits is None else limits.get(part.name)
        if dataclasses.is_dataclass(value):
            _check_limits(value, name, check)
        elif value is not None and check is not None:
            check(value, name)
