# SPDX-License-Identifier: Apache-2.0
"""What a plan is asked for.

A batch is counted in images on each chip: `batch` of them on each of the data x fsdp parts in which
the mesh splits the images of the slice. So a batch that fits one slice fits a larger one as well.
"""

from dataclasses import dataclass

from k3jax.config import ModelConfig, SamplerConfig
from k3jax.planning.chips import Slice
from k3jax.planning.programs import Name
from k3jax.planning.totals import Evaluations


TITLES = {
    "encode": "text encoder",
    "denoise": "denoising step",
    "denoise_plain": "step without guidance",
    "decode": "decoder",
}
PARTS = ("encode", "denoise", "decode")
"""What a person can ask for; `denoise` includes steps without guidance where there are any."""


@dataclass(frozen=True)
class Question:
    """What a plan is asked for.

    Attributes:
        model: as the checkpoint or config has it.
        sampler: that of the run: the model's own with what was asked for.
        mesh: of U-Net and decoder, as in `k3jax.sharding.make_mesh`.
        encoder_mesh: of the text encoder; None: the same, or split by `fsdp` over as few chips as
            its weights need.
        batch: images on each chip.
        parts: of PARTS.
        price: dollars for a chip and an hour.
    """

    where: Slice
    model: ModelConfig
    sampler: SamplerConfig
    batch: int
    height: int
    width: int
    mesh: str = "data=-1"
    encoder_mesh: str | None = None
    guidance_interval: tuple[int, int] | None = None
    dtype: str = "bfloat16"
    param_dtype: str = "bfloat16"
    int8_text_encoder: bool = False
    parts: tuple[str, ...] = PARTS
    price: float | None = None


def program_names(parts: tuple[str, ...], made: Evaluations) -> list[Name]:
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise ValueError(f"--programs {','.join(parts)!r}: choose of {', '.join(PARTS)}.")
    names: list[Name] = []
    for part in PARTS:
        if part in parts and part != "denoise":
            names.append(part)
        elif part in parts:
            names += ["denoise"] * (made.guided > 0) + ["denoise_plain"] * (made.plain > 0)
    return names
