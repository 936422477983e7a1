# SPDX-License-Identifier: Apache-2.0
"""Which files of a folder or repository make up a checkpoint; no weights are opened."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from k3jax.convert.architecture import settings_file
from k3jax.convert.rules import ConversionError
from k3jax.convert.weight_files import ReadBytes, weight_files
from k3jax.model.tokenizer import TOKENIZER_FILES


VARIANTS = {"base": "", "flash": "_flash", "inpainting": "_inpainting"}
"""Variant -> what the original files append to their names."""

ENCODER_FOLDERS = ("flan_ul2_encoder", "flan-ul2", "google/flan-ul2", "text_encoder")
"""Where people who run the original code keep the encoder (3.0 used google/flan-ul2 itself)."""

TEXT_STEMS = {"safetensors": "model", "bin": "pytorch_model"}
MODEL_STEMS = {"safetensors": "diffusion_pytorch_model", "bin": "diffusion_pytorch_model"}


@dataclass
class Layout:
    """Names, relative to the root, of all files to be read."""

    kind: str
    """`diffusers` or `original`."""
    weights: dict[str, list[str]] = field(default_factory=dict)
    """Component -> its file or shards; the original keeps several components in one."""
    configs: dict[str, str] = field(default_factory=dict)
    tokenizer: list[str] = field(default_factory=list)

    def files(self) -> list[str]:
        """Every file that is needed, for a download."""
        weights = (name for names in self.weights.values() for name in names)
        return sorted({*weights, *self.configs.values(), *self.tokenizer})


def find_layout(
    names: Iterable[str],
    where: str,
    *,
    variant: str = "base",
    weights_variant: str | None = None,
    text_encoder: bool = True,
    read_bytes: ReadBytes | None = None,
) -> Layout:
    """Recognises the layout and picks the files.

    Args:
        names: all files, relative to the root, with forward slashes.
        where: the folder or repository, for error messages.
        variant: one of VARIANTS.
        weights_variant: `fp16` for files named *.fp16.*; None: plain files, or the only variant.
        text_encoder: False leaves the text encoder out (another checkpoint has it).
        read_bytes: for the indexes of shards; None: shards are found by their names alone.

    Raises:
        ConversionError: no known layout, or a component without files; the message lists the
            names that were searched for.
    """
    names = set(names)
    if variant not in VARIANTS:
        raise ConversionError(f"variant is {variant!r}; it must be one of {list(VARIANTS)}.")
    if "model_index.json" in names or any(name.startswith("unet/") for name in names):
        return _diffusers(names, where, variant, weights_variant, text_encoder, read_bytes)
    main = [f"{root}kandinsky3{VARIANTS[variant]}.pt" for root in ("", "weights/")]
    if any(name in names for name in main):
        return _original(names, where, variant, weights_variant, text_encoder, read_bytes)
    others = [
        v
        for v, end in VARIANTS.items()
        if {f"kandinsky3{end}.pt", f"weights/kandinsky3{end}.pt"} & names
    ]
    if others:
        raise ConversionError(
            f"{where} has no {' or '.join(main)}; it holds the variant {', '.join(others)}: "
            f"choose it with --variant {others[0]}."
        )
    raise ConversionError(
        f"{where} holds no checkpoint that is known: neither model_index.json or unet/ (diffusers "
        f"layout) nor {' or '.join(main)} (original layout) exists."
    )


def _diffusers(names, where, variant, weights_variant, text_encoder, read_bytes):
    if variant == "inpainting":
        raise ConversionError(
            f"{where} is in the diffusers layout, whose U-Net cannot have the 9 input channels of "
            "the inpainting variant; convert the original kandinsky3_inpainting.pt."
        )
    layout = Layout("diffusers")
    components = {"unet": MODEL_STEMS, "movq": MODEL_STEMS}
    if text_encoder:
        components["text_encoder"] = TEXT_STEMS
    missing = []
    for component, stems in components.items():
        files = weight_files(names, f"{component}/", stems, where, weights_variant, read_bytes)
        if files:
            layout.weights[component] = files
        else:
            missing.append(f"{component} ({component}/{stems['safetensors']}*.safetensors or .bin)")
        if f"{component}/config.json" in names:
            layout.configs[component] = f"{component}/config.json"
        elif files:
            missing.append(f"{component}/config.json")
    if settings_file("diffusers", "") in names:
        layout.configs["k3jax"] = settings_file("diffusers", "")
    if "scheduler/scheduler_config.json" in names:
        layout.configs["scheduler"] = "scheduler/scheduler_config.json"
    layout.tokenizer = _tokenizer(names, ["tokenizer/"])
    if text_encoder and not layout.tokenizer:
        missing.append("the tokenizer (tokenizer/tokenizer.json or tokenizer/spiece.model)")
    _refuse(missing, where)
    return layout


def _original(names, where, variant, weights_variant, text_encoder, read_bytes):
    layout = Layout("original")
    end = VARIANTS[variant]
    root = "" if f"kandinsky3{end}.pt" in names else "weights/"
    layout.weights["unet"] = [f"{root}kandinsky3{end}.pt"]
    if root + settings_file("original", end) in names:
        layout.configs["k3jax"] = root + settings_file("original", end)
    missing = []
    if f"{root}movq.pt" in names:
        layout.weights["movq"] = [f"{root}movq.pt"]
    else:
        missing.append(f"movq ({root}movq.pt)")
    folders = [
        f"{base}{folder}/" for base in dict.fromkeys((root, "")) for folder in ENCODER_FOLDERS
    ]
    for folder in [*folders, root]:
        if f"{folder}projection{end}.pt" in names:  # absent in 3.0: kandinsky3.pt holds it
            layout.weights["text_projection"] = [f"{folder}projection{end}.pt"]
            break
    layout.tokenizer = _tokenizer(names, [*folders, f"{root}tokenizer/"])
    if text_encoder:
        for folder in folders:
            files = weight_files(names, folder, TEXT_STEMS, where, weights_variant, read_bytes)
            if files:
                layout.weights["text_encoder"] = files
                if f"{folder}config.json" in names:
                    layout.configs["text_encoder"] = f"{folder}config.json"
                break
        else:
            missing.append(
                f"the text encoder (pytorch_model*.bin or model*.safetensors in one of "
                f"{', '.join(folders)}; another checkpoint's can be shared with "
                "--text-encoder-from)"
            )
        if not layout.tokenizer:
            missing.append("the tokenizer (spiece.model or tokenizer.json in the encoder's folder)")
    _refuse(missing, where)
    return layout


def _refuse(missing, where):
    if missing:
        raise ConversionError(f"{where} lacks {'; '.join(missing)}.")


def _tokenizer(names, folders):
    for folder in folders:
        if {f"{folder}tokenizer.json", f"{folder}spiece.model"} & names:
            return [folder + file for file in TOKENIZER_FILES if folder + file in names]
    return []
