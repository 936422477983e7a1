# SPDX-License-Identifier: Apache-2.0
"""DreamBooth (arXiv:2208.12242): a subject from a few pictures, without forgetting its class.

    k3jax generate "a photo of a dog" -n 200 --checkpoint weights/kandinsky3 -o pictures/dogs
    k3jax train --config dreambooth --checkpoint weights/kandinsky3 --data pictures/my-dog

The captions of the pictures name the subject by a rare word ("a photo of a sks dog"). Half of each
batch is images of the class, which the first command generates; their prompts are in the PNGs.
"""

from ml_collections import ConfigDict

from k3jax.configs.training.lora import get_config as lora


def get_config():
    config = lora()
    config.train.output = "runs/dreambooth"
    config.train.steps = 1000
    config.train.data.cache = None
    config.train.loss.caption_dropout = 0.0
    config.train.prior = ConfigDict()
    config.train.prior.path = "pictures/dogs"
    config.train.prior.weight = 1.0
    config.train.prior.share = 0.5
    return config
