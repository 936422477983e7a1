# SPDX-License-Identifier: Apache-2.0
"""How well a model of drawn scenes follows captions that it was not trained on."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from k3jax.pipelines.text_to_image import Kandinsky3Pipeline
from k3jax.scenes.caption import captioned
from k3jax.scenes.checker import Verdict, check, summary
from k3jax.scenes.render import render
from k3jax.scenes.scene import Scene
from k3jax.training.tasks.autoencoder import psnr


SEED = 20  # of the scenes; training has its own


@dataclass(frozen=True)
class Judged:
    """A picture with its caption and the verdict of the checker."""

    scene: Scene
    caption: str
    image: np.ndarray
    verdict: Verdict


def unseen_captions(count: int) -> list[tuple[Scene, str]]:
    """Scenes of the test split: each has a look or a combination that no training scene has."""
    examples = (captioned(SEED, index, "test") for index in range(count))
    return [(scene, caption) for _, caption, scene in examples]


def judge(
    pipe: Kandinsky3Pipeline,
    count: int = 500,
    *,
    without_text: bool = False,
    progress: bool = False,
    **call,
) -> Iterator[Judged]:
    """Samples and checks one image of each of `count` captions; image k has the seed k.

    Args:
        without_text: use empty prompts, and still judge by the captions.
        call: arguments of the pipeline, such as guidance_scale and num_inference_steps.
    """
    captions = unseen_captions(count)
    with tqdm(total=count, unit="image", disable=not progress) as bar:
        for first in range(0, count, pipe.batch_size):
            part = captions[first : first + pipe.batch_size]
            prompts = ["" if without_text else caption for _, caption in part]
            output = pipe(prompts, seed=first, progress_bar=False, output_type="pil", **call)
            for (scene, caption), image in zip(part, output.images, strict=True):
                pixels = np.asarray(image)
                yield Judged(scene, caption, pixels, check(scene, pixels))
                bar.update()


def shares(judged: list[Judged]) -> dict[str, float]:
    """Share of right answers by question, over the pictures whose captions mention it."""
    return summary([one.verdict for one in judged])


def reconstruction(pipe: Kandinsky3Pipeline, count: int = 64) -> tuple[float, dict[str, float]]:
    """How well MoVQ alone reconstructs pictures of the test split.

    Returns:
        The PSNR in dB over all pixels, and the share of right answers by question: an upper bound
        for every U-Net on its latents.
    """
    scenes = unseen_captions(count)
    images = np.stack([render(scene) for scene, _ in scenes])
    errors, verdicts = [], []
    for first in range(0, count, 8):
        part = images[first : first + 8]
        decoded = pipe.decode(pipe.encode_arrays(part), "np").images
        errors.append(np.square(2 * (decoded - part / 255)).mean())
        pairs = zip(scenes[first : first + 8], decoded, strict=True)
        verdicts += [check(scene, image) for (scene, _), image in pairs]
    return psnr(float(np.mean(errors))), summary(verdicts)
