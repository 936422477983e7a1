# SPDX-License-Identifier: Apache-2.0
"""The options of a conversion: `convert.*` and `export.*` in a config file, and their flags."""

from dataclasses import dataclass
from typing import Literal

from k3jax.arguments import check_text
from k3jax.pipelines.option_fields import Options, option


Variant = Literal["base", "flash", "inpainting"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ConvertConfig(Options):
    """Options of `k3jax.convert.from_torch.convert`."""

    variant: Variant = option("base", "model of the source", flag="--variant")
    weights_variant: str | None = option(
        None, "fp16: read the files named *.fp16.*", check_text, "--weights-variant NAME"
    )
    text_encoder_from: str | None = option(
        None,
        "share the text encoder of this k3jax checkpoint (17 GB) instead of a copy",
        check_text,
        "--text-encoder-from CKPT",
    )
    param_dtype: Literal["bfloat16", "float16", "float32"] | None = option(
        None, "dtype of the weights (as in the source)", flag="--dtype"
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class ExportConfig(Options):
    """Options of `k3jax.convert.to_torch.export`."""

    layout: Literal["diffusers", "original"] = option(
        "diffusers",
        "diffusers: for Kandinsky3Pipeline.from_pretrained; original: kandinsky3.pt, movq.pt, ...",
        flag="--layout",
    )
    variant: Variant | None = option(
        None, "for the names of the original files (as it was converted)", flag="--variant"
    )
