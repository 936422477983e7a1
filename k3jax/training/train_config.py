# SPDX-License-Identifier: Apache-2.0
"""What a training run is told, as frozen dataclasses: the `train` part of a config file.

Values that most runs share are the defaults; `configs/` has one file per task.
"""

from dataclasses import dataclass, field
from typing import Literal

from k3jax.config import LoraConfig


Task = Literal["text_to_image", "inpainting", "movq", "text_encoder"]
SourceKind = Literal["folder", "webdataset", "parquet", "scenes"]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv:1711.05101), Adafactor (arXiv:1804.04235) where memory is short, or Muon
    (arXiv:2502.16982: updates of the size of Adam's) for a U-Net from scratch in fewer steps.
    """

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    learning_rate: float = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up; `cosine` falls to `final_learning_rate` at the last step."""
    final_learning_rate: float = 0.0
    warmup_steps: int = 1000
    weight_decay: float = 0.01
    """Of kernels, token embeddings and LoRA factors; never of biases and norm scales."""
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0
    gradient_accumulation_steps: int = 1
    """Parts that a batch is cut into; their gradients are averaged before one update."""


@dataclass(frozen=True)
class LossConfig:
    snr_gamma: float | None = None
    """Min-SNR weighting (arXiv:2303.09556): the usual value is 5. None: every timestep weighs 1."""
    layout_weight: float | None = None
    """Largest weight of the errors at high noise, which decide what lies where; None: all 1."""
    timesteps: tuple[int, int] = (0, 1000)
    """First that is drawn, and the one behind the last: (600, 970) trains what lies where alone."""
    caption_dropout: float = 0.1
    """Share of samples trained on the checkpoint's own unconditional input."""


@dataclass(frozen=True)
class DataConfig:
    kind: SourceKind = "folder"
    path: str | None = None
    """Folder, or a glob or list (comma-separated) of tars or Parquet files. `scenes` has none."""
    caption_column: str = "caption"
    image_column: str = "image"
    resolution: int = 1024
    """Side of a square image with the area that every bucket has at most."""
    aspect_buckets: bool = True
    """False: centre crops of resolution x resolution."""
    cache: str | None = None
    """Folder for latents and text embeddings, computed once; None: computed as they are needed."""
    num_workers: int = 0
    """Processes that read and decode images; 0: this one."""
    shuffle: bool = True
    num_scenes: int = 100_000
    """Scenes drawn by `scenes`; of a finite number so that latents can be cached."""
    scene_mix: Literal["all", "places", "pairs", "several"] = "all"
    """Of `scenes`, `places`: only those whose caption says where something is; `pairs`: mostly
    those of two objects; `several`: the same with more of two to four alike."""
    crop: int | None = None
    """Side of the part around an object that `scenes` gives instead of the whole picture (MoVQ)."""


@dataclass(frozen=True)
class MaskConfig:
    """Shares of the kinds of inpainting masks; they need not add up to 1."""

    boxes: float = 0.5
    strokes: float = 0.35
    whole: float = 0.15
    objects: float = 0.0
    """The box around one object and a margin, with data of kind `scenes` alone."""


@dataclass(frozen=True)
class PriorConfig:
    """Prior preservation of DreamBooth (arXiv:2208.12242): the class beside the subject."""

    path: str
    """Folder of class images with captions, such as `k3jax generate` writes."""
    weight: float = 1.0
    share: float = 0.5
    """Of a batch that is class images."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 1000
    keep_last: int = 2
    keep_best: int = 1
    """By the validation loss, or the smoothed training loss where there are no validation data."""
    every_minutes: float | None = None
    """Also after so many minutes; for machines that may vanish."""


@dataclass(frozen=True)
class TrainConfig:
    task: Task = "text_to_image"
    output: str = "train"
    """Folder of the run: checkpoints, metrics and sample grids; a run that is there is resumed."""
    from_scratch: bool = False
    """Random weights for the trained components instead of the checkpoint's."""
    components: tuple[str, ...] = ("text_projection", "unet")
    """What is trained; the rest is frozen. Names as in `k3jax.model.abstract.COMPONENTS`."""
    decoder_only: bool = False
    """Of `movq`: the encoder stays as it is, and with it every U-Net trained on its latents."""
    steps: int = 10_000
    batch_size: int = 32
    """Samples per update over the whole mesh, gradient accumulation included."""
    seed: int = 0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the computation; trained weights are float32."""
    frozen_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    remat: bool = True
    """Recompute the blocks' activations in the backward pass."""
    ema_decay: float | None = 0.9999
    """None: no moving average."""
    log_every: int = 10
    sample_every: int = 1000
    """Sample grids; 0: none."""
    sample_prompts: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()
    """Names of configs that are trained one after the other instead of this one."""
    validation_batches: int = 0
    """Held-out batches for the validation loss, at every checkpoint."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig | None = None
    masks: MaskConfig = field(default_factory=MaskConfig)
    prior: PriorConfig | None = None
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
