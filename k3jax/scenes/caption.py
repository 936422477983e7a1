# SPDX-License-Identifier: Apache-2.0
"""The English sentence of a scene."""

import numpy as np

from k3jax.scenes.render import render
from k3jax.scenes.scene import (
    BACKGROUNDS,
    CANVAS,
    COLORS,
    POSITIONS,
    SHAPES,
    SIZES,
    SPLITS,
    TEXTURES,
    Scene,
    SceneObject,
    scene_at,
)


PHRASES = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
NUMBERS = {2: "two", 3: "three", 4: "four"}
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """The caption of a scene, in lower case: "a large striped blue square on a navy background".

    Args:
        rng: chooses the phrase of a relation; None: the first of PHRASES.
    """
    if scene.kind == "count":
        words = [NUMBERS[scene.count], *_adjectives(scene.objects[0])]
        text = " ".join([*words, PLURALS[scene.objects[0].shape]])
    else:
        nouns = [_article(" ".join([*_adjectives(o), o.shape])) for o in scene.objects]
        joint = "and"
        if scene.relation is not None:
            phrases = PHRASES[scene.relation]
            joint = phrases[0 if rng is None else rng.integers(len(phrases))]
        text = f" {joint} ".join(nouns)
    if scene.position is not None:
        text += f" {scene.position}"
    if scene.named_background:
        text += f" on {_article(f'{scene.background} background')}"
    return text


def captioned(
    seed: int, index: int, split: str = "train", size: int = CANVAS, mix: str = "all"
) -> tuple[np.ndarray, str, Scene]:
    """Example number `index` of a split, always the same one.

    Returns:
        The image uint8 (size, size, 3), its caption and its scene.
    """
    scene = scene_at(seed, index, split, size, mix)
    # A stream of its own: the phrasing must not depend on the number of draws of the scene.
    rng = np.random.default_rng([seed, index, SPLITS[split], 1])
    return render(scene), caption(scene, rng), scene


def vocabulary() -> list[str]:
    """Every word of all captions, sorted."""
    phrases = [phrase for options in PHRASES.values() for phrase in options]
    texts = ["a an and on background", *phrases, *NUMBERS.values(), *PLURALS.values()]
    texts += [*SHAPES, *COLORS, *BACKGROUNDS, *POSITIONS, *filter(None, SIZES)]
    texts += [texture for texture in TEXTURES if texture != "plain"]
    return sorted({word for text in texts for word in text.split()})


def _adjectives(item: SceneObject) -> list[str]:
    texture = None if item.texture == "plain" else item.texture
    return [word for word in (item.size_name, texture, item.color) if word]


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
