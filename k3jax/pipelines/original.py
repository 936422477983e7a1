# SPDX-License-Identifier: Apache-2.0
"""The functions and argument names of the original repository, for the pipelines of k3jax.

    from k3jax import get_T2I_pipeline  # instead of: from kandinsky3 import get_T2I_pipeline

What differs: `seed` reproduces an image (without it every call draws a new one); an inpainted image
has its own size, with the known pixels as they were; a negative prompt works for inpainting too.
The first call converts the weights, which needs PyTorch: pip install 'k3jax[convert]'.
Source of names and defaults: ai-forever/Kandinsky-3, __init__.py, t2i_pipeline.py,
inpainting_pipeline.py, utils.py.
"""

import hashlib
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from scipy import ndimage

from k3jax.arguments import whole_number
from k3jax.checkpoints.format import as_path, looks_like_checkpoint
from k3jax.files import user_cache
from k3jax.images.masks import read_mask
from k3jax.pipelines.inpaint import Kandinsky3InpaintPipeline
from k3jax.pipelines.pipeline import BasePipeline
from k3jax.pipelines.text_to_image import Kandinsky3Pipeline
from k3jax.sharding import data_parallelism, make_mesh


REPOSITORY = "ai-forever/Kandinsky3.1"
UNET_FILES = {
    "base": "kandinsky3.pt",
    "flash": "kandinsky3_flash.pt",
    "inpainting": "kandinsky3_inpainting.pt",
}
MASK_GROWTH = 6  # pixels by which the original's prepare_mask widens a mask of floats


class OriginalT2I:
    """`Kandinsky3T2IPipeline` of the original; `pipe` is the pipeline of k3jax."""

    def __init__(self, pipe: Kandinsky3Pipeline):
        self.pipe = pipe

    def __call__(
        self,
        text: str,
        negative_text: str | None = None,
        images_num: int = 1,
        bs: int = 1,
        width: int | None = None,
        height: int | None = None,
        guidance_scale: float = 3.0,
        steps: int = 50,
        eta: float = 1.0,
        seed: int | None = None,
    ) -> list[Image.Image]:
        """Images of a text. Flash ignores `steps`, `eta` and `guidance_scale`.

        Args:
            bs: images at a time.
            width, height: the checkpoint's own (1024) by default.
            seed: of the first image; drawn where it is None.
        """
        pipe = _with_batch_size(self.pipe, bs, images_num)
        return pipe(
            text,
            negative_text,
            height=height,
            width=width,
            num_inference_steps=None if self.pipe.config.sampler.name == "flash" else steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=images_num,
            eta=eta,
            seed=_seed(seed),
        ).images


class OriginalInpainting:
    """`Kandinsky3InpaintingPipeline` of the original; `pipe` is the pipeline of k3jax."""

    def __init__(self, pipe: Kandinsky3InpaintPipeline):
        self.pipe = pipe

    def __call__(
        self,
        text: str,
        image: Image.Image,
        mask: np.ndarray,
        negative_text: str | None = None,
        images_num: int = 1,
        bs: int = 1,
        steps: int = 50,
        guidance_weight_text: float = 4,
        eta: float = 1.0,
        seed: int | None = None,
    ) -> list[Image.Image]:
        """Images that are painted anew where `mask` is 1.

        Args:
            bs, seed: see `OriginalT2I`.
        """
        pipe = _with_batch_size(self.pipe, bs, images_num)
        return pipe(
            text,
            image,
            mask,
            negative_prompt=negative_text,
            num_inference_steps=steps,
            guidance_scale=guidance_weight_text,
            num_images_per_prompt=images_num,
            eta=eta,
            seed=_seed(seed),
        ).images


def get_T2I_pipeline(
    device_map: Any,
    dtype_map: Any = "float32",
    low_cpu_mem_usage: bool = True,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    cache_dir: str | None = None,
    unet_path: str | None = None,
    text_encoder_path: str | None = None,
    movq_path: str | None = None,
    checkpoint: str | None = None,
) -> OriginalT2I:
    """Text to image with Kandinsky 3.1.

    Args:
        device_map: a device as "cuda:0", a torch.device, or a dict of these (its `unet` counts);
            also a mesh, or axis sizes as "data=-1", for more than one.
        dtype_map: a dtype or a dict by `unet`, `text_encoder`, `movq`, as text or torch.dtype. Half
            precision is bfloat16.
        low_cpu_mem_usage: always so.
        cache_dir: where converted weights are kept; the user's cache by default.
        unet_path, text_encoder_path, movq_path: the original's files, all three, instead of
            the published ones.
        checkpoint: a folder written by `k3jax convert`, instead of all that.

    Raises:
        ValueError: 8 or 4 bits, which are not supported, or arguments that exclude each other.
    """
    _refuse_bits(load_in_8bit, load_in_4bit)
    paths = (unet_path, text_encoder_path, movq_path)
    found = checkpoint or _converted("base", cache_dir, paths)
    return OriginalT2I(_load(Kandinsky3Pipeline, found, device_map, dtype_map))


def get_T2I_Flash_pipeline(
    device_map: Any,
    dtype_map: Any = "float32",
    low_cpu_mem_usage: bool = True,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    cache_dir: str | None = None,
    unet_path: str | None = None,
    text_encoder_path: str | None = None,
    movq_path: str | None = None,
    checkpoint: str | None = None,
) -> OriginalT2I:
    """Text to image in 4 steps; the arguments are those of `get_T2I_pipeline`."""
    _refuse_bits(load_in_8bit, load_in_4bit)
    paths = (unet_path, text_encoder_path, movq_path)
    found = checkpoint or _converted("flash", cache_dir, paths)
    return OriginalT2I(_load(Kandinsky3Pipeline, found, device_map, dtype_map))


def get_inpainting_pipeline(
    device_map: Any,
    dtype_map: Any = "float32",
    low_cpu_mem_usage: bool = True,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    cache_dir: str | None = None,
    unet_path: str | None = None,
    text_encoder_path: str | None = None,
    movq_path: str | None = None,
    checkpoint: str | None = None,
) -> OriginalInpainting:
    """Inpainting; the arguments are those of `get_T2I_pipeline`."""
    _refuse_bits(load_in_8bit, load_in_4bit)
    paths = (unet_path, text_encoder_path, movq_path)
    found = checkpoint or _converted("inpainting", cache_dir, paths)
    return OriginalInpainting(_load(Kandinsky3InpaintPipeline, found, device_map, dtype_map))


def prepare_mask(mask: Any) -> np.ndarray:
    """A mask widened by 6 pixels, int (h, w) of 0 and 1.

    The same as in the original for masks of floats. The original's loses or narrows 8-bit masks.
    """
    repaint = read_mask(mask, "mask") > 0
    return ndimage.maximum_filter(repaint, 2 * MASK_GROWTH + 1).astype(int)


def _load(kind: type[BasePipeline], checkpoint, device_map: Any, dtype_map: Any) -> BasePipeline:
    dtypes = dtype_map if isinstance(dtype_map, Mapping) else dict.fromkeys(_PARTS, dtype_map)
    names = {part: _dtype(dtypes.get(part, "float32")) for part in _PARTS}
    return kind.from_pretrained(checkpoint, mesh=_mesh(device_map), dtype=names)


_PARTS = ("unet", "text_encoder", "movq")


def _dtype(dtype: Any) -> str:
    name = getattr(dtype, "__name__", str(dtype)).split(".")[-1]
    return "bfloat16" if name in ("float16", "half") else name


def _mesh(device_map: Any) -> jax.sharding.Mesh:
    device = device_map.get("unet") if isinstance(device_map, Mapping) else device_map
    if isinstance(device, jax.sharding.Mesh):
        return device
    if "=" in str(device):
        return make_mesh(str(device))
    number, devices = str(device).partition(":")[2] or "0", jax.devices()
    if not number.isdigit() or int(number) >= len(devices):
        raise ValueError(f"device_map is {device}, but JAX sees {len(devices)} devices.")
    return make_mesh("data=1", [devices[int(number)]])


def _converted(variant: str, cache_dir: str | None, paths: tuple[str | None, ...]) -> Path:
    """The converted checkpoint of a variant; converts it where it does not exist."""
    root = Path(as_path(cache_dir) if cache_dir is not None else user_cache() / "weights")
    given = [path for path in paths if path is not None]
    if given and len(given) < len(paths):
        raise ValueError("give unet_path, text_encoder_path and movq_path together, or none.")
    name = f"kandinsky3.1-{variant}"
    if given:
        name += "-" + hashlib.sha256("\n".join(map(_version, given)).encode()).hexdigest()[:12]
    folder = root / name
    if looks_like_checkpoint(folder):
        return folder

    from k3jax.convert.from_torch import convert

    if not given:
        others = [root / f"kandinsky3.1-{v}" for v in UNET_FILES if v != variant]
        shared = next((other for other in others if looks_like_checkpoint(other)), None)
        convert(REPOSITORY, folder, variant=variant, text_encoder_from=shared)
        return folder
    with tempfile.TemporaryDirectory() as links:
        for link, path in zip(
            (UNET_FILES[variant], "flan_ul2_encoder", "movq.pt"), paths, strict=True
        ):
            (Path(links) / link).symlink_to(as_path(path))
        convert(links, folder, variant=variant)
    return folder


def _version(path: str) -> str:
    """A path and when what is there was written."""
    file = Path(as_path(path))
    if not file.exists():
        raise ValueError(f"there is nothing at {path}.")
    return f"{file} {file.stat().st_mtime_ns}"


def _with_batch_size(pipe: BasePipeline, bs: int, images_num: int) -> BasePipeline:
    """The same pipeline with at most `bs` images in a batch."""
    bs, images_num = (
        whole_number(value, name, least=1)
        for name, value in (("bs", bs), ("images_num", images_num))
    )
    splits = data_parallelism(pipe.mesh)
    return type(pipe).from_pipe(pipe, batch_size=-(-min(bs, images_num) // splits) * splits)


def _seed(seed: int | None) -> int:
    return secrets.randbits(32) if seed is None else seed


def _refuse_bits(load_in_8bit: bool, load_in_4bit: bool) -> None:
    if load_in_8bit or load_in_4bit:
        raise ValueError(
            "text encoders of 8 or 4 bits are not supported: leave load_in_8bit and load_in_4bit "
            "out; half precision is dtype_map={'text_encoder': 'float16'}."
        )
