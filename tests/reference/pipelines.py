# SPDX-License-Identifier: Apache-2.0
"""Runs the original pipelines with the tiny models, from prompt to image. For make_original.py."""

from unittest import mock

import numpy as np
import torch
from PIL import Image

from . import cases, original
from .weights import normal


COUNTS = (3, 9, 40)
"""Tokens of the three prompts, end-of-sequence included."""
IMAGES = 2
SIZE = 64

# case: U-Net, steps asked for, guidance scale, negative prompts of the same length
CASES_31 = {
    "kandinsky_5": ("unet4", 5, 3.0, False),
    "kandinsky_10": ("unet4", 10, 3.0, False),
    "kandinsky_negative_10": ("unet4", 10, 3.0, True),
    "flash": ("unet4", 4, 3.0, False),
    "inpainting_10": ("unet9", 10, 4.0, False),
    "inpainting_odd": ("unet9", 6, 4.0, False),
    "flash_refine": ("unet4", 2, 3.0, False),
}
CASES_30 = {
    "kandinsky30_10": ("unet4", 10, 3.0, False),
    "kandinsky30_negative_10": ("unet4", 10, 3.0, True),
}


ODD = (150, 100)
"""Width and height of the picture of inpainting_odd; worked on at 128 x 64."""


def prompt(name: str, count: int) -> str:
    """A "prompt" of `count` tokens, one of which is the end-of-sequence."""
    spread = np.abs(normal(f"prompt.{name}", (count - 1,), cases.SEED))
    return cases.token_text(
        2 + (spread * 1000).astype(int) % (cases.TEXT_ENCODER["vocab_size"] - 2)
    )


def picture(odd: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """An image in uint8, and the mask of what to repaint (1) in it; of ODD size with a soft one."""
    width, height = ODD if odd else (SIZE, SIZE)
    y, x = np.mgrid[:height, :width] / SIZE
    waves = np.stack([np.sin(9 * x + 2), np.sin(7 * y), np.sin(12 * (x - y) + 1)], axis=-1)
    image = np.round(127.5 + 110 * waves).astype(np.uint8)
    mask = np.zeros((height, width))
    mask[16:48, 24:60] = 1  # the right edge lies inside a latent pixel
    if odd:
        mask[30:90, 60:120] = np.linspace(0, 1, 60)
    return image, mask


def modules(code, old: bool, component: str, dtype, change: float):
    """Tiny U-Net, text encoder, MoVQ and null embedding; each weight times 1 + change * normal."""
    unet, movq = original.unet(code, component), original.movq(code)
    encoder = original.text_encoder30(code) if old else original.text_encoder(code)
    for index, module in enumerate((unet, movq, encoder)):
        for name, p in module.named_parameters():
            unit = torch.from_numpy(normal(f"change.{index}.{name}", tuple(p.shape), cases.SEED))
            p.data = (p.data * (1 + change * unit)).to(dtype)
    # The 3.0 code computes sin and cos in float32 whatever the dtype of the weights.
    unet.to_time_embed[0].register_forward_hook(lambda module, args, out: out.to(dtype))
    return unet, encoder, movq, original.null_embedding().to(dtype)


def build(code, case: str, parts):
    """The original's pipeline as a function: text, negative -> images (2, 3, 64, 64) in [0, 1]."""
    _, steps, guidance, _ = (CASES_31 | CASES_30)[case]
    unet, encoder, movq, null = parts
    size = {"width": SIZE, "height": SIZE}
    count = {"images_num": IMAGES, "bs": IMAGES, "steps": steps}
    if case in CASES_30:
        tokens = original.processor(code, old=True)
        pipe = code.t2i_pipeline.Kandinsky3T2IPipeline(
            "cpu", unet, null, tokens, encoder, movq, fp16=False
        )
        return lambda text, negative: pipe(text, negative, guidance_scale=guidance, **count, **size)
    dtype = next(unet.parameters()).dtype
    where = dict.fromkeys(("text_encoder", "unet", "movq"), "cpu")
    kinds = dict.fromkeys(where, dtype)
    shared = where, kinds, unet, null, original.processor(code), encoder, movq
    if case.startswith("inpainting"):
        pipe = code.inpainting_pipeline.Kandinsky3InpaintingPipeline(*shared)
        encode = movq.encode  # a picture arrives in float32 whatever the dtype of the weights
        movq.encode = lambda x: encode(x.to(dtype))
        image, mask = picture(case == "inpainting_odd")
        image = Image.fromarray(image)
        return lambda text, _: pipe(text, image, mask, guidance_weight_text=guidance, **count)
    if case == "flash_refine":
        return lambda text, _: refine(code, shared, text, steps)
    pipe = code.t2i_pipeline.Kandinsky3T2IPipeline(*shared, gan=case == "flash")
    return lambda text, negative: pipe(text, negative, guidance_scale=guidance, **count, **size)


def refine(code, shared, text: str, steps: int):
    """The last steps of Flash over the picture, as KandiSuperRes runs its Flash U-Net."""
    _, _, unet, null, tokens, encoder, movq = shared
    found, _ = tokens.encode(text)
    context, mask = encoder({key: value[None] for key, value in found.items()})
    times = list(range(979, 0, -250))[-steps:]
    image = torch.from_numpy(picture()[0]).permute(2, 0, 1)[None].to(null.dtype) / 127.5 - 1
    start = movq.encode(image).repeat(IMAGES, 1, 1, 1)
    diffusion = code.diffusion.BaseDiffusion(
        code.diffusion.get_named_beta_schedule("cosine", 1000), 0.99
    )
    context, mask = (x.repeat(IMAGES, *(1,) * (x.ndim - 1)) for x in (context, mask))
    torch.randn()  # the queue's starting noise, which an image takes the place of
    with mock.patch.object(torch, "randn", lambda *shape, device=None: start):
        latents = diffusion.p_sample_loop(
            unet, start.shape, times, "cpu", context, mask, null, 0.0, gan=True
        )
    return list((movq.decode(latents) / 2 + 0.5).clip(0, 1))


def run_once(code, queue, case: str, dtype=torch.float32, change: float = 0.0):
    """Arrays and meta of one case: each prompt by itself, as the original demands."""
    component, steps, guidance, with_negative = (CASES_31 | CASES_30)[case]
    odd = case == "inpainting_odd"
    counts = COUNTS[1:2] if odd or case == "flash_refine" else COUNTS
    prompts = [prompt(f"pipeline.{count}", count) for count in counts]
    negatives = [prompt(f"pipeline.negative.{count}", count) for count in counts]
    pipe = build(code, case, modules(code, case in CASES_30, component, dtype, change))
    width, height = (side // 64 * 64 for side in (ODD if odd else (SIZE, SIZE)))
    shape = (IMAGES * len(prompts), 4, height // 8, width // 8)
    start, each = cases.noise(case, steps, shape)
    queue.dtype, latents, images, extra = dtype, [], [], {}
    loop = code.diffusion.BaseDiffusion.p_sample_loop

    def recording(*args, **kwargs):
        extra.update({k: kwargs[k] for k in ("mask", "masked_latent") if kwargs.get(k) is not None})
        latents.append(loop(*args, **kwargs))
        return latents[-1]

    with mock.patch.object(code.diffusion.BaseDiffusion, "p_sample_loop", recording):
        for k, text in enumerate(prompts):
            here = slice(k * IMAGES, (k + 1) * IMAGES)
            queue.put(start[here], each[:, here])
            images += pipe(text, negatives[k] if with_negative else None)
            assert not queue.arrays
    queue.dtype = torch.float32
    arrays = {"latents": torch.cat(latents), "images": torch.stack(images)}
    tokenizer = cases.IdTokenizer()
    arrays |= token_arrays("", prompts, tokenizer)
    if with_negative:
        arrays |= token_arrays("negative_", negatives, tokenizer)
    if extra:
        image, mask = picture(odd)
        arrays |= {"image": image, "repaint": mask if odd else mask.astype(np.uint8)}
        arrays |= {"mask": extra["mask"][:1], "masked_latent": extra["masked_latent"][:1]}
    if case == "flash_refine":
        arrays["image"] = picture()[0]
    meta = {
        "case": case,
        "unet": component,
        "steps": steps,
        "guidance": guidance,
        "prompts": prompts,
        "negatives": negatives if with_negative else None,
        "images_per_prompt": IMAGES,
        "latent_shape": shape,
    }
    return arrays, meta


def token_arrays(prefix: str, texts: list[str], tokenizer) -> dict:
    """Ids and masks (prompts, 128), padded by hand as the original's processor does."""
    ids = np.full((len(texts), cases.MAX_TOKENS), cases.PAD)
    for row, text in zip(ids, texts, strict=True):
        tokens = tokenizer(text)["input_ids"]
        row[: len(tokens)] = tokens
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": (ids != cases.PAD).astype(int)}


def run(code, queue, case: str) -> tuple[dict, dict]:
    """The stored arrays and meta of a case, and how well conditioned its images are."""
    arrays, meta = run_once(code, queue, case)
    images = arrays["images"]
    inner = ((images > 0) & (images < 1)).float().mean()
    print(f"{case}: std {images.std():.3f}, unsaturated {inner:.3f}")
    for what, args in {"float64": (torch.float64,), "1e-6": (torch.float32, 1e-6)}.items():
        other = run_once(code, queue, case, *args)[0]
        error = meta[f"difference_{what}"] = float((other["images"] - images).abs().max() * 255)
        print(f"    {what}: images differ by at most {error:.4f} / 255")
    arrays["images"] = np.round(images.numpy() * 65535).astype(np.uint16)
    return arrays, meta
