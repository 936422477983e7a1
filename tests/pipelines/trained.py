# SPDX-License-Identifier: Apache-2.0
"""How well the small trained models do the tasks, measured by the pixel checker.

    python tests/pipelines/trained.py [--base DIR] [--inpainting DIR] [--count N] [--output DIR]

Prints the numbers of the README as JSON and writes the strips of pictures it speaks of.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from k3jax import Kandinsky3Img2ImgPipeline, Kandinsky3InpaintPipeline
from k3jax.images.pngs import ContactSheet
from k3jax.scenes.caption import caption, captioned
from k3jax.scenes.checker import read
from k3jax.scenes.render import render
from k3jax.scenes.scene import COLORS, Scene


SEED = 21  # of the scenes; training and evaluation have their own
MARGIN = 4  # pixels of the hole around what is taken away
NEAR = 10.0  # pixels that count as the same place
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)


def hole(scene: Scene, number: int) -> np.ndarray:
    """The box around an object of a scene, with a margin: bool (size, size)."""
    item = scene.objects[number]
    mask = np.zeros((scene.size, scene.size), bool)
    low = [max(0, int(c - item.radius - MARGIN)) for c in item.center]
    high = [int(c + item.radius + MARGIN) + 1 for c in item.center]
    mask[low[1] : high[1], low[0] : high[0]] = True
    return mask


def without(scene: Scene, number: int) -> np.ndarray:
    """The picture of a scene with one object taken away."""
    rest = tuple(o for k, o in enumerate(scene.objects) if k != number)
    return render(dataclasses.replace(scene, objects=rest))


def inpaint(pipe: Kandinsky3InpaintPipeline, count: int, **call) -> dict:
    """Objects that are put back where they were taken away, in scenes that training never saw.

    Returns:
        Shares of `count`: `there` has an object of the named colour and shape in the hole; `rest`
        has all other objects as before, by the checker; `untouched` has the same pixels beyond the
        feather; and the first pictures as (given, made, caption).
    """
    scenes = [captioned(SEED, index, "test") for index in range(count)]
    there, rest, untouched, shown = [], [], [], []
    for first in range(0, count, 50):
        part = [(k, *scenes[k]) for k in range(first, min(first + 50, count))]
        numbers = [k % len(scene.objects) for k, _, _, scene in part]
        images = [without(s, n) for (_, _, _, s), n in zip(part, numbers, strict=True)]
        masks = [hole(s, n) for (_, _, _, s), n in zip(part, numbers, strict=True)]
        texts = [text for _, _, text, _ in part]
        made = pipe(texts, images, masks, seed=first, progress_bar=False, **call).images
        for (_, _, text, scene), number, image, mask, result in zip(
            part, numbers, images, masks, made, strict=True
        ):
            pixels, item = np.asarray(result), scene.objects[number]
            found = read(pixels).objects
            there.append(
                any(
                    (f.color, f.shape) == (item.color, item.shape)
                    and mask[int(f.center[1]), int(f.center[0])]
                    for f in found
                )
            )
            others = [o for k, o in enumerate(scene.objects) if k != number]
            rest.append(all(_at(found, o.center, o.color, o.shape) for o in others))
            far = _grown(mask, 9)
            untouched.append(np.array_equal(pixels[~far], image[~far]))
            if len(shown) < 16:
                given = image.copy()
                given[mask] = 128
                shown.append((given, pixels, text))
    means = {"there": there, "rest": rest, "untouched": untouched}
    return {name: float(np.mean(v)) for name, v in means.items()} | {"shown": shown}


def img2img(
    pipe: Kandinsky3Img2ImgPipeline, count: int, strengths: Sequence[float] = STRENGTHS, **call
) -> dict:
    """Scenes of one object, with a prompt that asks for another colour, at rising strengths.

    Returns:
        For each strength: `place`, the share with an object where one was; `prompt`, the share
        with the colour that is asked for on that shape, wherever it is; and the first pictures.
    """
    scenes = []
    index = 0
    while len(scenes) < count:
        scene = captioned(SEED, index, "test")[2]
        if scene.kind == "single" and scene.position is None:
            scenes.append(scene)
        index += 1
    colors = list(COLORS)
    wanted = []
    for number, scene in enumerate(scenes):
        item = scene.objects[0]
        color = colors[(colors.index(item.color) + 1 + number % 7) % len(colors)]
        wanted.append(dataclasses.replace(scene, objects=(dataclasses.replace(item, color=color),)))
    images, texts = [render(scene) for scene in scenes], [caption(scene) for scene in wanted]
    shown = [[(images[k], texts[k])] for k in range(min(8, count))]
    results = {}
    for strength in strengths:
        made = pipe(texts, images, strength, seed=0, progress_bar=False, **call).images
        found = [read(np.asarray(image)).objects for image in made]
        items = [scene.objects[0] for scene in wanted]
        pairs = list(zip(found, items, strict=True))
        results[strength] = {
            "place": float(np.mean([_at(f, item.center) for f, item in pairs])),
            "prompt": float(
                np.mean(
                    [any((o.color, o.shape) == (i.color, i.shape) for o in f) for f, i in pairs]
                )
            ),
        }
        for row, image in zip(shown, made, strict=False):
            row.append((np.asarray(image), f"{strength:g}"))
    return {"strengths": results, "shown": shown}


def sheet(cells: Sequence[tuple[np.ndarray, str]], columns: int) -> Image.Image:
    """Pictures with captions in rows of `columns`."""
    height, width = cells[0][0].shape[:2]
    grid = ContactSheet(len(cells), width, height, multiple=columns)
    for image, text in cells:
        grid.add(Image.fromarray(image), text)
    return grid.image()


def _at(found, center, color: str | None = None, shape: str | None = None) -> bool:
    return any(
        np.hypot(*np.subtract(f.center, center)) <= NEAR
        and (color is None or (f.color, f.shape) == (color, shape))
        for f in found
    )


def _grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    from scipy import ndimage

    return ndimage.maximum_filter(mask, 2 * pixels + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--inpainting", default="tiny-inpainting")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    load = dict(dtype="float32", batch_size=25)
    base = Kandinsky3Img2ImgPipeline.from_pretrained(args.base, **load)
    model = Kandinsky3InpaintPipeline.from_pretrained(args.inpainting, **load)
    blend = Kandinsky3InpaintPipeline.from_pipe(base)
    results = {
        "inpainting_model": inpaint(model, args.count),
        "inpainting_blend": inpaint(blend, args.count),
        "image_to_image": img2img(base, min(args.count, 50)),
    }
    strips = {name: result.pop("shown") for name, result in results.items()}
    print(json.dumps(results, indent=2))
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        for name in ("inpainting_model", "inpainting_blend"):
            cells = [
                c for given, made, text in strips[name] for c in ((given, "given"), (made, text))
            ]
            sheet(cells, 2).save(args.output / f"{name}.png")
        cells = [cell for row in strips["image_to_image"] for cell in row]
        sheet(cells, 1 + len(STRENGTHS)).save(args.output / "image_to_image.png")


if __name__ == "__main__":
    main()
