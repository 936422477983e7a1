# SPDX-License-Identifier: Apache-2.0
"""Measure how well a model of drawn scenes does what it is told.

  k3jax evaluate
  k3jax evaluate --checkpoint train/tiny/unet/checkpoint --guidance-scale 0

Makes an image of each of 500 captions that were kept out of training, reads the pixels, and prints
the share of images that show what the caption says, and beside it the share that is left of drawn
scenes when the autoencoder alone has rebuilt them. With --output, the images are kept as a
contact sheet, and the numbers as JSON. Only for models trained on `k3jax.scenes`, such as the one
that comes with k3jax.
"""

import argparse
import json
from pathlib import Path


QUESTIONS = {
    "color_on_shape": "every named colour on its shape",
    "objects": "both objects of two",
    "relation": "left of, right of, above, below",
    "count": "how many",
    "position": "where in the picture",
    "size": "small, large",
    "texture": "striped, dotted",
    "background": "background",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", default="tiny", help="the model (tiny)")
    add("--count", type=int, default=500, metavar="N", help="images (500)")
    add("--steps", type=int, metavar="N", help="passes of the U-Net (the checkpoint's own)")
    add("--sampler", metavar="NAME", help="the checkpoint's own by default")
    add("--guidance-scale", type=float, metavar="W", help="the checkpoint's own by default")
    add("--without-text", action="store_true", help="empty prompts: what chance would give")
    add("--batch-size", type=int, default=32, metavar="N", help="images at a time (32)")
    add("-o", "--output", metavar="DIR", help="folder for a contact sheet and the numbers")


def run(args: argparse.Namespace) -> None:
    if args.count < 1 or args.batch_size < 1:
        raise ValueError("--count and --batch-size must be 1 or more.")

    from PIL import Image

    from k3jax.images.pngs import ContactSheet, write_png
    from k3jax.pipelines.text_to_image import Kandinsky3Pipeline
    from k3jax.training.scene_evaluation import judge, reconstruction, shares

    pipe = Kandinsky3Pipeline.from_pretrained(
        args.checkpoint, dtype="float32", batch_size=args.batch_size
    )
    call = {
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "sampler": args.sampler,
    }
    judged = list(
        judge(pipe, args.count, without_text=args.without_text, progress=args.progress, **call)
    )
    result = shares(judged)
    decibel, rebuilt = reconstruction(pipe)
    print("    made  rebuilt  right")
    for name, meaning in QUESTIONS.items():
        if name in result:
            asked = sum(getattr(one.verdict, name) is not None for one in judged)
            most = f"{100 * rebuilt[name]:5.1f} %" if name in rebuilt else ""
            row = f"{100 * result[name]:6.1f} %  {most:7}  {meaning}"
            print(f"{row} ({name}, {asked} images)")
    print(f"The autoencoder rebuilds unseen scenes with a PSNR of {decibel:.1f} dB.")
    if args.output is not None:
        folder = Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        sheet = ContactSheet(len(judged), *judged[0].image.shape[1::-1])
        for number, one in enumerate(judged):
            wrong = [name for name in QUESTIONS if getattr(one.verdict, name) is False]
            fault = f" WRONG: {', '.join(wrong)}" if wrong else ""
            sheet.add(Image.fromarray(one.image), f"{number} {one.caption}{fault}")
        write_png(sheet.image(), folder / "contact_sheet.png")
        numbers = {"checkpoint": args.checkpoint, "count": args.count, **call, **result}
        numbers["without_text"] = args.without_text
        numbers["movq"] = {"psnr": decibel, **rebuilt}
        (folder / "evaluation.json").write_text(json.dumps(numbers, indent=2) + "\n")
        print(folder / "contact_sheet.png")
