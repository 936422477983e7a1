# SPDX-License-Identifier: Apache-2.0
"""Tasks: a new one is a class and a row of a table; and the architecture of a run."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from PIL import Image

from k3jax.checkpoints.restore import iterate_leaves, read_checkpoint
from k3jax.config import LoraConfig
from k3jax.training.data.training_data import TrainingData
from k3jax.training.run import train
from k3jax.training.tasks import TASKS
from k3jax.training.tasks.task import Task, architecture
from k3jax.training.train_config import TrainConfig


class Numbers:
    """Batches of one number each, which know their position."""

    def __init__(self):
        self.number = 0

    def batch(self, number):
        return {"numbers": np.full((8,), number, np.float32)}

    def __next__(self):
        self.number += 1
        return self.batch(self.number - 1)

    def state(self):
        return {"number": self.number}

    def restore(self, state):
        self.number = state["number"]

    def close(self):
        pass


class Shrinking(Task):
    """Pulls the weights of the text projection to the mean of a batch of numbers."""

    name = "shrinking"

    @classmethod
    def components(cls, config):
        return ("text_projection",)

    def open_data(self, tokenizer, progress):
        return TrainingData(Numbers(), [Numbers().batch(3)])

    def loss(self, weights, frozen, batch, key):
        errors = [jnp.square(w - batch["numbers"].mean()).mean() for w in weights.values()]
        return sum(errors), {"largest": jnp.stack(errors).max()}

    def sampler(self, batch, tokenizer):
        def sample(weights):
            value = np.clip(255 * np.abs(weights["text_projection.norm.bias"]).mean(), 0, 255)
            return np.full((8, 8, 3), value, np.uint8)

        return sample


def test_a_new_task_is_a_class_and_a_row(run, base, tmp_path, monkeypatch):
    """Data, loss, validation, pictures, resuming and the result come with it."""
    monkeypatch.setitem(TASKS, Shrinking.name, Shrinking)
    wanted = run(task="shrinking", cached=False, steps=2, sample_every=2)
    assert train(wanted) == tmp_path / "run" / "checkpoint"
    longer = dataclasses.replace(wanted, train=dataclasses.replace(wanted.train, steps=4))
    result = read_checkpoint(train(longer))
    assert result.source["task"] == "shrinking" and result.source["steps"] == 4
    shared = read_checkpoint(base).component_paths
    assert result.component_paths["unet"] == shared["unet"]
    assert result.component_paths["text_projection"] != shared["text_projection"]
    paths = (read_checkpoint(path) for path in (base, result.path))
    old, new = (dict(iterate_leaves(path, "text_projection")) for path in paths)
    assert all(np.abs(new[name] - old[name]).max() > 0 for name in old)
    assert Image.open(tmp_path / "run" / "samples" / "step_00000002.png").size == (8, 8)


def test_what_starts_from_scratch_is_made_as_the_config_says(base):
    checkpoint = read_checkpoint(base)
    theirs = checkpoint.config
    wider = dataclasses.replace(theirs.unet, block_out_channels=(64,))
    asked = dataclasses.replace(
        theirs, unet=wider, movq=dataclasses.replace(theirs.movq, layers_per_block=7)
    )
    made = architecture(TrainConfig(from_scratch=True), asked, checkpoint)
    assert made.unet == wider
    assert made.movq == theirs.movq, "which is not trained, and has its weights"
    assert architecture(TrainConfig(), asked, checkpoint) == theirs
    lora = TrainConfig(from_scratch=True, lora=LoraConfig())
    assert architecture(lora, asked, checkpoint) == theirs
    assert architecture(TrainConfig(from_scratch=True), None, checkpoint) == theirs
    assert architecture(TrainConfig(), asked, None) == asked
