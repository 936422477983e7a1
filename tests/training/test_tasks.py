# SPDX-License-Identifier: Apache-2.0
"""Tasks: a new one is a class and a row of a table; and the architecture of a run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from k3jax.checkpoints.restore import iterate_leaves, read_checkpoint
from k3jax.config import LoraConfig
from k3jax.sharding import make_mesh
from k3jax.training.data.scene_tokenizer import captions_to_learn
from k3jax.training.data.training_data import TrainingData
from k3jax.training.tasks import TASKS, make_task
from k3jax.training.tasks.task import Task, architecture
from k3jax.training.train_config import TrainConfig
from k3jax.training.training_run import train


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


TASKS_OF_CONFIGS = {
    "text_to_image": {"components": ("text_encoder", "text_projection", "unet")},
    "inpainting": {"task": "inpainting", "components": ("unet",)},
    "lora of inpainting": {"task": "inpainting", "lora": LoraConfig(rank=2)},
    "decoder": {"task": "movq", "decoder_only": True, "data": {"crop": 64, "resolution": 128}},
    "text_encoder": {"task": "text_encoder", "from_scratch": True},
}


@pytest.mark.parametrize("name", TASKS_OF_CONFIGS)
def test_data_and_loss_of_each_task_fit_each_other(name, run, base, tmp_path, monkeypatch):
    """Traced, not compiled: whole runs are in test_train.py."""
    few = functools.partial(captions_to_learn, count=300)
    monkeypatch.setattr("k3jax.training.data.scene_tokenizer.captions_to_learn", few)
    config, checkpoint = run(cached=False, **TASKS_OF_CONFIGS[name]).train, read_checkpoint(base)
    mesh = make_mesh("data=1", jax.devices()[:1])
    model = checkpoint.config
    if name == "text_encoder":
        wider = dataclasses.replace(model.text_encoder, vocab_size=416)
        model = dataclasses.replace(model, text_encoder=wider)
    task = make_task(config, model, checkpoint, mesh)
    data = task.open_data(task.tokenizer(tmp_path, new=True), progress=False)
    batch = data.batches.batch(0)
    data.batches.close()
    assert {len(array) for array in batch.values()} == {8}
    frozen = {name: task.abstract(name) for name in task.frozen}
    weights = task.first_weights()
    assert {n: (w.shape, w.dtype) for n, w in weights.items()} == {
        n: (s.shape, s.dtype) for n, s in task.shapes.items()
    }
    assert task.shardings.keys() == task.shapes.keys()
    loss, metrics = jax.eval_shape(task.loss, task.shapes, frozen, batch, jax.random.key(0))
    assert loss.shape == () and all(value.shape == () for value in metrics.values())
