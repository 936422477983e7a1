# SPDX-License-Identifier: Apache-2.0
"""Writes the .npz files of this folder by running the original PyTorch code on the CPU in float32.

    python -m tests.reference.make_original --original DIR --original30 DIR

Each DIR holds the folder `kandinsky3` of a checkout of ai-forever/Kandinsky-3: at commit a4c9e92
(3.1) and at 1150779 (as shipped with 3.0). The stored files were made with torch 2.13.0 (CPU
build), transformers 5.23.0 and numpy 2.4.6; scipy and scikit-image (0.26.0) are needed besides.
"""

import argparse
import json
import warnings
from pathlib import Path

import numpy as np
import torch

from . import cases, original, pipelines, samplers
from .weights import checksum, normal


VERSION = 1


def save(name: str, arrays: dict, meta: dict):
    """Writes one file; equal contents give equal bytes."""
    meta = {"version": VERSION, "torch": torch.__version__, "seed": cases.SEED} | meta
    arrays = {k: v.numpy() if torch.is_tensor(v) else v for k, v in arrays.items()}
    path = cases.FOLDER / f"{name}.npz"
    np.savez_compressed(path, meta=json.dumps(meta), **arrays)
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")
    for key, value in arrays.items():
        print(f"    {key} {value.shape} {value.dtype}")


def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(normal(name, shape, cases.SEED))


def write_shapes(code):
    """Names and shapes of all tensors, with a checksum of the values that they get."""
    modules = {name: original.unet(code, name) for name in cases.UNETS}
    modules |= {"movq": original.movq(code), "text_encoder": original.t5()}
    modules |= {"projection": original.text_encoder(code).projection}
    states = {name: module.state_dict() for name, module in modules.items()}
    states["null_embedding"] = {"null_embedding": original.null_embedding()}
    shapes = {c: {k: list(v.shape) for k, v in state.items()} for c, state in states.items()}
    sums = {c: checksum({k: v.numpy() for k, v in s.items()}) for c, s in states.items()}
    save("original_shapes", {}, {"shapes": shapes, "checksums": sums})


@torch.no_grad()
def write_unet(code):
    """One call of each U-Net; `unet4` also with a fully masked row, and without a mask."""
    tokens, width = 12, cases.UNET["cross_attention_dim"]
    arrays = {
        "x": draw("unet.x", (2, 9, 16, 16)),
        "t": torch.tensor([979.0, 19.0]),
        "context": draw("unet.context", (2, tokens, width)),
        "mask": torch.arange(tokens) < torch.tensor([[11], [5]]),
    }
    arrays["context"][~arrays["mask"]] = 0  # padding is zero after the projection
    # Distinct keys everywhere and nothing to see in row 0: the original attends uniformly.
    arrays["full_context"] = draw("unet.full_context", (2, tokens, width))
    arrays["empty_mask"] = torch.arange(tokens) < torch.tensor([[0], [7]])
    plain, full = ("context", "mask"), ("full_context", "empty_mask")
    runs = {
        "unet4": ("unet4", *plain),
        "unet9": ("unet9", *plain),
        "unet_two_levels": ("unet_two_levels", *plain),
        "unet4_empty_mask": ("unet4", *full),
        "unet4_no_mask": ("unet4", "full_context", None),
        "unet_no_cross": ("unet_no_cross", *plain),
        "unet_no_cross_no_context": ("unet_no_cross", None, None),
    }
    rounding = {}
    for run, (component, context, mask) in runs.items():
        model = original.unet(code, component)
        context, mask = (arrays[k] if k else None for k in (context, mask))
        x = arrays["x"][:, : cases.UNETS[component]["in_channels"]]
        out = arrays[f"{run}_output"] = model(x, arrays["t"], context, mask)
        context = None if context is None else context.double()
        exact = model.double()(x.double(), arrays["t"].double(), context, mask)
        rounding[run] = float((out - exact).abs().max())
        print(f"{run}: std {out.std():.3f}, rounding {rounding[run]:.1e}")
    save("original_unet", arrays, {"runs": runs, "rounding": rounding})


@torch.no_grad()
def write_text(code):
    """Tokens, masks, contexts: prompts alone, negatives, and the unconditional context."""
    encode, encoder = original.processor(code).encode, original.text_encoder(code)
    arrays, prompts, negatives = {}, {}, {}
    for count in (1, 3, 9, 128, 140):  # with the end-of-sequence; 140 is cut to 128
        prompts[f"prompt_{count}"] = pipelines.prompt(f"text.{count}", count)
    for case, count in {"equal": 9, "shorter": 4, "longer": 15}.items():
        negatives[f"negative_{case}"] = pipelines.prompt(f"text.{case}", count)

    def record(key, tokens):
        tokens = {k: v[None] for k, v in tokens.items()}
        arrays[f"{key}_input_ids"], arrays[f"{key}_attention_mask"] = tokens.values()
        if key == "prompt_9":
            arrays[f"{key}_embeddings"] = encoder.encoder(**tokens).last_hidden_state
        arrays[f"{key}_context"], arrays[f"{key}_context_mask"] = encoder(tokens)

    for key, text in prompts.items():
        record(key, encode(text)[0])
    for key, text in negatives.items():
        record(key, encode(prompts["prompt_9"], text)[1])

    context, mask = arrays["prompt_9_context"], arrays["prompt_9_context_mask"]
    seen = samplers.guidance_inputs(code, context, mask, original.null_embedding())
    arrays["unconditional_context"], arrays["unconditional_context_mask"] = seen
    save("original_text", arrays, {"prompts": prompts, "negatives_of_prompt_9": negatives})


def write_movq(code):
    model = original.movq(code)
    image, latent = 0.5 * draw("movq.image", (1, 3, 64, 48)), draw("movq.latent", (1, 4, 8, 6))
    arrays = {"image": image, "encoded": model.encode(image)}
    arrays |= {"latent": latent, "decoded": model.decode(latent)}
    model.double()
    rounding = {
        "encode": float((model.encode(image.double()) - arrays["encoded"]).abs().max()),
        "decode": float((model.decode(latent.double()) - arrays["decoded"]).abs().max()),
    }
    print("movq:", arrays["encoded"].std(), arrays["decoded"].std(), rounding)
    save("original_movq", arrays, {"rounding": rounding})


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--original", type=Path, required=True)
    parser.add_argument("--original30", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*autocast.*")

    queue = original.NoiseQueue()
    with original.original(args.original, queue) as code:
        write_shapes(code)
        write_unet(code)
        write_text(code)
        write_movq(code)
        loops = samplers.run_31(code, queue)
        for case in pipelines.CASES_31:
            save(f"original_pipeline_{case}", *pipelines.run(code, queue, case))
    with original.original(args.original30, queue) as code:
        loops += samplers.run_30(code, queue)
        for case in pipelines.CASES_30:
            save(f"original_pipeline_{case}", *pipelines.run(code, queue, case))
    save("original_samplers", *samplers.merge(loops))


if __name__ == "__main__":
    main()
