# SPDX-License-Identifier: Apache-2.0
"""The values that a run's settings may have, as a table.

What depends on more than one setting, on the checkpoint or on the data is checked where it is used.
"""

import math
from dataclasses import dataclass
from typing import Any

from k3jax.config import from_dict, to_dict
from k3jax.training.train_config import TrainConfig


@dataclass(frozen=True)
class Limit:
    """An interval of finite numbers.

    Attributes:
        low, high: its ends; None: no end.
        open_low, open_high: whether the end itself is outside.
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

LIMITS = {
    "steps": COUNT,
    "batch_size": COUNT,
    "seed": Limit(0, 2**32 - 1),  # JAX's keys repeat from there on
    "ema_decay": DECAY,
    "log_every": COUNT,
    "sample_every": NOT_NEGATIVE,
    "validation_batches": NOT_NEGATIVE,
    "optimizer.learning_rate": POSITIVE,
    "optimizer.final_learning_rate": NOT_NEGATIVE,
    "optimizer.warmup_steps": NOT_NEGATIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.b1": DECAY,
    "optimizer.b2": DECAY,
    "optimizer.eps": POSITIVE,
    "optimizer.max_grad_norm": POSITIVE,
    "optimizer.gradient_accumulation_steps": COUNT,
    "loss.snr_gamma": POSITIVE,
    "loss.layout_weight": COUNT,
    "loss.caption_dropout": SHARE,
    "data.resolution": COUNT,
    "data.num_workers": NOT_NEGATIVE,
    "data.num_scenes": COUNT,
    "data.crop": COUNT,
    "lora.rank": COUNT,
    "lora.alpha": POSITIVE,
    "masks.boxes": NOT_NEGATIVE,
    "masks.strokes": NOT_NEGATIVE,
    "masks.whole": NOT_NEGATIVE,
    "masks.objects": NOT_NEGATIVE,
    "prior.weight": NOT_NEGATIVE,
    "prior.share": Limit(0, 1, open_low=True, open_high=True),
    "checkpoint.every": COUNT,
    "checkpoint.keep_last": COUNT,
    "checkpoint.keep_best": NOT_NEGATIVE,
    "checkpoint.every_minutes": POSITIVE,
}
"""Numbers of TrainConfig by their dotted names; a setting that is None has none."""


def checked(config: TrainConfig) -> TrainConfig:
    """The config itself, once every setting has its type and a value that can be meant.

    Raises:
        ValueError: the first that has not, with its name and what it may be.
    """
    config = from_dict(TrainConfig, to_dict(config), "train")
    for name, limit in LIMITS.items():
        value = _value(config, name)
        if value is not None and value not in limit:
            finite = "" if math.isfinite(value) else "finite and "
            raise ValueError(f"train.{name} is {value}; it must be {finite}{limit}.")
    if not config.output:
        raise ValueError("train.output (--output) is empty: name a folder for the run.")
    return config


def _value(config: Any, name: str) -> Any:
    for part in name.split("."):
        if config is None:
            return None
        config = getattr(config, part)
    return config
