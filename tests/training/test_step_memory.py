# SPDX-License-Identifier: Apache-2.0
"""The training step compiled without weights, and the memory that the compiler says it takes."""

import jax
import numpy as np
import pytest

from k3jax.checkpoints.format import read_checkpoint
from k3jax.config import LoraConfig
from k3jax.model.abstract import abstract_module, parameter_count
from k3jax.sharding import make_mesh
from k3jax.training.step_memory import lower_step, step_memory
from k3jax.training.train_config import DataConfig, TrainConfig


pytestmark = pytest.mark.slow  # each test compiles whole steps
BATCH = 8


@pytest.fixture(scope="module")
def model(base):
    return read_checkpoint(base).config


def memory(model, spec: str, **changes):
    config = TrainConfig(batch_size=BATCH, data=DataConfig(cache="not read here"), **changes)
    mesh = make_mesh(spec, jax.devices()[:2])
    return step_memory(lower_step(config, model, mesh, size=64, tokens=32).compile())


@pytest.fixture(scope="module")
def trained(model):
    """Trained weights, of four bytes each."""
    names = ("text_projection", "unet")
    return 4 * sum(parameter_count(abstract_module(name, model)) for name in names)


def test_what_lies_on_each_device(model, trained):
    copied = memory(model, "data=2")
    # Weights, their average and two moments; besides them a sample of the batch, which is small.
    assert 4 * trained < copied.state < 4.1 * trained
    split = memory(model, "fsdp=2")
    assert split.state < 0.53 * copied.state  # biases and scales are copied
    assert split.total == split.state + split.temporaries > split.state


def test_a_lora_keeps_the_weights_once(model, trained):
    lora = memory(model, "data=2", lora=LoraConfig(rank=2), ema_decay=None)
    # The frozen weights in bfloat16, and a little for the updates and their moments.
    assert np.isclose(lora.state, trained / 2, rtol=0.3)
