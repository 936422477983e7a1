# SPDX-License-Identifier: Apache-2.0
"""Imports a checkout of the original PyTorch code and builds its tiny models. For make_original.py.

Nothing here is needed by the tests. Packages that the original imports but that do nothing for the
stored numbers are replaced by small stand-ins.
"""

import contextlib
import importlib
import sys
import types
from pathlib import Path

import numpy as np
import torch
import transformers

from . import cases
from .weights import fill, randomise_


class NoiseQueue:
    """Replaces torch.randn and torch.randn_like: hands out prepared arrays in order."""

    def __init__(self):
        self.arrays, self.dtype = [], torch.float32

    def put(self, start, each):
        self.arrays = [start, *each]

    def randn(self, *shape, device=None):
        return self._next(shape)

    def randn_like(self, x):
        return self._next(x.shape)

    def _next(self, shape):
        array = self.arrays.pop(0)
        if not shape:  # only to be passed over
            return None
        assert array.shape == tuple(shape), (array.shape, shape)
        return torch.from_numpy(array).to(self.dtype)


def to_tensor(picture):
    """torchvision's ToTensor for what the inpainting pipeline passes: images and float masks."""
    array = np.asarray(picture)
    if array.ndim == 2:
        return torch.from_numpy(array.copy())[None]
    return torch.from_numpy(array.copy()).permute(2, 0, 1).to(torch.float32) / 255


def stand_ins() -> dict[str, types.ModuleType]:
    modules = {}
    for name, members in {
        "torchvision": {},
        # With the identity for ToPILImage the pipelines return float images in [0, 1].
        "torchvision.transforms": {
            "ToPILImage": lambda: lambda x: x,
            "ToTensor": lambda: to_tensor,
        },
        "omegaconf": {"OmegaConf": None},
        "pandas": {},
        "matplotlib": {},
        "matplotlib.path": {"Path": None},
    }.items():
        modules[name] = types.ModuleType(name)
        vars(modules[name]).update(members)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, modules[name])
    return modules


@contextlib.contextmanager
def original(checkout: Path, queue: NoiseQueue):
    """Yields a namespace of the original's modules, imported from `checkout`/kandinsky3."""
    for name in ("T5Tokenizer", "T5EncoderModel", "T5Model", "CLIPModel", "CLIPImageProcessor"):
        getattr(transformers, name)  # before the stand-ins, at which transformers would look
    fakes = stand_ins()
    hidden = {name: sys.modules.pop(name) for name in fakes if name in sys.modules}
    drawn = torch.randn, torch.randn_like
    sys.modules.update(fakes)
    sys.path.insert(0, str(checkout))
    torch.randn, torch.randn_like = queue.randn, queue.randn_like
    try:
        yield types.SimpleNamespace(
            **{
                name.rpartition(".")[2]: importlib.import_module(f"kandinsky3.{name}")
                for name in (
                    "model.unet",
                    "model.diffusion",
                    "movq",
                    "condition_encoders",
                    "condition_processors",
                    "t2i_pipeline",
                    "inpainting_pipeline",
                )
            }
        )
    finally:
        torch.randn, torch.randn_like = drawn
        sys.path.remove(str(checkout))
        for name in [n for n in sys.modules if n.partition(".")[0] == "kandinsky3"] + list(fakes):
            sys.modules.pop(name, None)
        sys.modules.update(hidden)


def unet(code, component: str):
    config = cases.UNETS[component]
    widths = config["block_out_channels"]
    flags = (False, True, True, True)
    return randomise_(
        code.unet.UNet(
            model_channels=widths[0],
            init_channels=config["init_channels"],
            num_channels=config["in_channels"],
            out_channels=config["out_channels"],
            time_embed_dim=config["time_embedding_dim"],
            context_dim=config["cross_attention_dim"],
            groups=config["groups"],
            head_dim=config["attention_head_dim"],
            dim_mult=tuple(width // widths[0] for width in widths),
            num_blocks=(config["layers_per_block"],) * 4,
            add_cross_attention=config.get("add_cross_attention", flags),
            add_self_attention=config.get("add_self_attention", flags),
        ),
        cases.SEED,
    )


def movq(code):
    widths = cases.MOVQ["block_out_channels"]
    return randomise_(
        code.movq.MoVQ(
            {
                "double_z": False,
                "z_channels": 4,
                "resolution": 64,
                "in_channels": 3,
                "out_ch": 3,
                "ch": widths[0],
                "ch_mult": [width // widths[0] for width in widths],
                "num_res_blocks": cases.MOVQ["layers_per_block"],
                "attn_resolutions": [8],  # 64 / 8: the deepest level alone
                "dropout": 0.0,
            }
        ),
        cases.SEED,
    )


def t5():
    config = transformers.T5Config(
        **cases.TEXT_ENCODER, feed_forward_proj="gated-silu", dropout_rate=0.0, use_cache=False
    )
    return randomise_(transformers.T5EncoderModel(config), cases.SEED)


def text_encoder(code):
    """T5TextConditionEncoder of the 3.1 code around the tiny T5."""
    module = code.condition_encoders
    module.T5EncoderModel = types.SimpleNamespace(from_pretrained=lambda *_, **__: t5())
    width = cases.TEXT_PROJECTION["cross_attention_dim"]
    encoder = module.T5TextConditionEncoder("", width)
    randomise_(encoder.projection, cases.SEED)
    return encoder.eval()


def text_encoder30(code):
    """ConditionEncoder of the 3.0 code. Its T5 subclass rounds to float16, so not that one."""

    class Float32Encoder(code.condition_encoders.ConditionEncoder):
        def encode(self, model_input, model_name):
            return self.t5(**model_input).last_hidden_state

    width = cases.TEXT_PROJECTION["cross_attention_dim"]
    encoder = Float32Encoder(width, {"t5": cases.TEXT_PROJECTION["d_model"]})
    encoder.t5 = t5().encoder
    randomise_(encoder.projections["t5"], cases.SEED)
    return encoder.eval()


def processor(code, old: bool = False):
    """T5TextConditionProcessor of either code with the tokenizer of ids."""
    module = code.condition_processors
    module.T5Tokenizer = types.SimpleNamespace(from_pretrained=lambda _: cases.IdTokenizer())
    if old:
        return module.T5TextConditionProcessor({"t5": cases.MAX_TOKENS}, {"t5": ""})
    return module.T5TextConditionProcessor(cases.MAX_TOKENS, "")


def null_embedding():
    shape = (cases.TEXT_PROJECTION["cross_attention_dim"],)
    return torch.from_numpy(fill({"null_embedding": shape}, cases.SEED)["null_embedding"])
