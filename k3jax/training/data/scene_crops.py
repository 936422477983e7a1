# SPDX-License-Identifier: Apache-2.0
"""Parts of scenes around an object, for an autoencoder: most of a whole scene is background."""

import numpy as np

from k3jax.scenes.caption import captioned
from k3jax.training.data.source import Sample, SceneSource


REACH = 0.45
"""How far the centre of a part lies from that of the object at most, in sides of the part."""


class SceneCropSource(SceneSource):
    """Squares of `crop` pixels, each around a random object of a scene of `size` pixels."""

    def __init__(
        self,
        count: int,
        size: int,
        crop: int,
        split: str = "train",
        seed: int = 0,
        mix: str = "all",
    ):
        super().__init__(count, size, split, seed, mix)
        if not 0 < crop <= size:
            raise ValueError(
                f"data.crop is {crop}; it must be between 1 and the {size} of a scene."
            )
        self._scene_size, self._crop, self.size = size, crop, (crop, crop)

    def __getitem__(self, number: int) -> Sample:
        image, caption, scene = captioned(
            self._seed, number, self._split, self._scene_size, self._mix
        )
        rng = np.random.default_rng([self._seed, number, 2])
        item = scene.objects[rng.integers(len(scene.objects))]
        shift = rng.uniform(-REACH * self._crop, REACH * self._crop, 2)
        corner = np.round(np.asarray(item.center) - self._crop / 2 + shift)
        x, y = np.clip(corner, 0, self._scene_size - self._crop).astype(int)
        part = image[y : y + self._crop, x : x + self._crop]
        return Sample(self.key(number), np.ascontiguousarray(part), caption)
