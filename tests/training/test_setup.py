# SPDX-License-Identifier: Apache-2.0
"""Whose architecture a run has: the checkpoint's, or the config's."""

import dataclasses

from k3jax.checkpoints.restore import read_checkpoint
from k3jax.config import LoraConfig
from k3jax.training.tasks.task import architecture
from k3jax.training.train_config import TrainConfig


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
