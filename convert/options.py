# SPDX-License-Identifier: Apache-2.0
"""The options of a conversion: `convert.*` and `export.*` in a config file."""

from dataclasses import dataclass
from typing import Literal


Variant = Literal["base", "flash", "inpainting"]


@dataclass(frozen=True)
class ConvertConfig:
    """Arguments of `k3jax.convert.from_torch.convert`."""

    variant: Variant = "base"
    weights_variant: str | None = None
    text_encoder_from: str | None = None
    param_dtype: Literal["bfloat16", "float16", "float32"] | None = None


@dataclass(frozen=True)
class ExportConfig:
    """Arguments of `k3jax.convert.to_torch.export`."""

    layout: Literal["diffusers", "original"] = "diffusers"
    variant: Variant | None = None
