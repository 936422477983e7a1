# SPDX-License-Identifier: Apache-2.0
"""An inpainting model (9 input channels), from a text-to-image or an inpainting checkpoint.

    k3jax train --config train_inpainting --checkpoint weights/kandinsky3 --data pictures

From a text-to-image checkpoint, the weights of the new channels start at zero. Masks are boxes,
brush strokes and whole images. Without a cache every epoch uses new masks.
"""

from ml_collections import ConfigDict

from k3jax.configs.training.finetune import get_config as finetune


def get_config():
    config = finetune()
    config.train.task = "inpainting"
    config.train.output = "runs/inpainting"
    config.train.data.cache = None
    config.train.masks = ConfigDict()
    config.train.masks.boxes = 0.5
    config.train.masks.strokes = 0.35
    config.train.masks.whole = 0.15
    return config
