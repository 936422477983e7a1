# SPDX-License-Identifier: Apache-2.0
"""Pictures to give to the tasks, and the scheduler that diffusers is run with."""

import numpy as np


SCHEDULER = dict(beta_schedule="squaredcos_cap_v2", timestep_spacing="leading", steps_offset=1)


def picture(number: int, width: int = 64, height: int = 64) -> np.ndarray:
    """A picture of soft waves, uint8 (height, width, 3); another for each number."""
    y, x = np.mgrid[:height, :width] / 64
    waves = [np.sin((k + 2 + number) * x + (4 - k) * y + number) for k in range(3)]
    return np.round(127.5 + 110 * np.stack(waves, axis=-1)).astype(np.uint8)
