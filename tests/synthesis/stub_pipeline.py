# SPDX-License-Identifier: Apache-2.0
"""A pipeline without a model: its images are a function of prompt, seed and size, and cost nothing.

As a script it is the command line with that pipeline in the place of the real one.
"""

import hashlib
import sys
import time
from dataclasses import dataclass, field

import jax
import numpy as np

from k3jax.model.context import PromptEmbeds


WIDTH, TOKENS = 16, 128
FIRST = 8  # images of a first shard


@dataclass
class StubPipeline:
    """The part of `Kandinsky3Pipeline` that data sets are made with.

    A prompt with the word "nan" gives an image that is not a number. `seconds` is what a batch
    takes; where there are two numbers, the first for the first shard's.
    """

    batch_size: int
    mesh: jax.sharding.Mesh
    encoder_mesh: jax.sharding.Mesh
    seconds: tuple[float, ...] = (0.0,)
    parts: tuple[str, ...] = ()
    encoded: list[list[str]] = field(default_factory=list)
    calls: list[dict] = field(default_factory=list)

    @classmethod
    def on(cls, devices, **options):
        return cls(devices.batch_size, devices.mesh, devices.encoder_mesh, **options)

    @property
    def tokenizer(self):
        """A token for each word."""
        return self

    def whole(self, prompts):
        return [([0] * (len(prompt.split()) + 1), None) for prompt in prompts]

    def encode_prompt(self, prompts):
        self.encoded.append(list(prompts))
        embeds = np.zeros((len(prompts), TOKENS, WIDTH), np.float32)
        mask = np.zeros((len(prompts), TOKENS), bool)
        for row, prompt in enumerate(prompts):
            tokens = min(TOKENS, len(prompt.split()) + 1)
            mask[row, :tokens] = True
            embeds[row, :tokens] = np.frombuffer(_digest(prompt)[:WIDTH], np.uint8)
            embeds[row, 0, 0] = 1000 if "nan" in prompt.split() else 0
        return PromptEmbeds(embeds, mask, np.minimum(mask.sum(1) + 1, TOKENS).astype(np.int32))

    def __call__(self, prompt_embeds, height, width, seed, guidance_scale, **rest):
        given = {"height": height, "width": width, "seed": list(seed), "guided": guidance_scale}
        self.calls.append({**given, **rest})
        negative = rest.get("negative_prompt_embeds")
        first = len(self.calls) * self.batch_size <= FIRST
        time.sleep(self.seconds[0 if first else -1])
        images = []
        for row, number in enumerate(seed):
            values = prompt_embeds.embeds[row]
            text = values.tobytes() + (b"" if negative is None else negative.embeds[row].tobytes())
            rng = np.random.default_rng([number, *_digest(text)])
            small = rng.random((height // 16, width // 16, 3), np.float32)
            image = np.kron(small, np.ones((16, 16, 1), np.float32))
            if values[0, 0] == 1000:
                image[0, 0, 0] = np.nan
            images.append(image)
        return type("Output", (), {"images": np.stack(images)})


def _digest(data) -> bytes:
    return hashlib.sha256(data if isinstance(data, bytes) else data.encode()).digest()


def install(setattr, **options) -> list[StubPipeline]:
    """Puts stubs in the place of pipelines; the list gets each that is made."""
    from k3jax.synthesis import regeneration, weights

    made = []

    def loader(weights, settings, devices):
        def load(parts):
            made.append(StubPipeline.on(devices, parts=tuple(parts), **options))
            return made[-1]

        return load

    setattr(weights, "loader", loader)
    setattr(regeneration, "loader", loader)
    return made


if __name__ == "__main__":
    from k3jax.cli.main import main

    seconds, *words = sys.argv[1:]
    install(setattr, seconds=tuple(map(float, seconds.split(","))))
    sys.exit(main(words))
