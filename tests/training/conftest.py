# SPDX-License-Identifier: Apache-2.0
"""A small checkpoint to train from, and runs on drawn scenes that last seconds."""

import jax
import jax.numpy as jnp
import pytest

from k3jax.sharding import make_mesh
from k3jax.training.tasks.denoising import Denoising
from k3jax.training.train_config import (
    CheckpointConfig,
    DataConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
)
from k3jax.training.training_run import TrainingRun

from random_checkpoint import write_random_checkpoint
from training_models import MODEL


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A checkpoint with random weights."""
    path = tmp_path_factory.mktemp("base") / "checkpoint"
    write_random_checkpoint(path, MODEL)
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where latents and embeddings of the scenes are kept for all tests."""
    return tmp_path_factory.mktemp("cache") / "latents"


@pytest.fixture
def run(base, cache, tmp_path, monkeypatch):
    """Makes a TrainingRun: 13 scenes at 64 pixels, 8 a step, float32, on one device.

    What meshes do is in test_step.py; a program for 8 devices takes three times as long to compile.
    """
    one = jax.devices()[:1]
    monkeypatch.setattr(
        "k3jax.training.training_run.make_mesh", lambda spec: make_mesh("data=1", one)
    )

    def make(cached=True, data=None, optimizer=None, loss=None, **train):
        data = {
            "kind": "scenes",
            "num_scenes": 13,  # captions of up to 64 bytes: a step is compiled once
            "resolution": 64,
            "aspect_buckets": False,
            "cache": str(cache) if cached else None,
            **(data or {}),
        }
        defaults = {
            "output": str(tmp_path / "run"),
            "steps": 4,
            "batch_size": 8,
            "dtype": "float32",
            "frozen_dtype": "float32",
            "remat": False,
            "ema_decay": None,
            "log_every": 1,
            "sample_every": 0,
            "checkpoint": CheckpointConfig(every=2),
        }
        rule = {"warmup_steps": 1, "learning_rate": 1e-3, **(optimizer or {})}
        config = TrainConfig(
            data=DataConfig(**data),
            optimizer=OptimizerConfig(**rule),
            loss=LossConfig(**(loss or {})),
            **{**defaults, **train},
        )
        return TrainingRun(config, checkpoint=str(base))

    return make


@pytest.fixture
def stub_loss(monkeypatch):
    """A loss of the U-Net's tasks that compiles in a second; everything around it is real.

    It depends on the weights, the batch and the key, as a loss does.
    """

    def loss(task, weights, frozen, batch, key):
        noise = jax.random.normal(key, ())
        total = sum(jnp.square(w - 0.1 * noise).mean() for w in weights.values())
        return total + next(iter(batch.values())).astype(jnp.float32).mean() / 255, {}

    monkeypatch.setattr(Denoising, "loss", loss)
