# SPDX-License-Identifier: Apache-2.0
"""The size at which an image is worked on."""

MAX_RATIO = 16
"""Of the sides of an image of which one must be enlarged."""


def work_size(width: int, height: int, max_area: int, multiple: int) -> tuple[int, int]:
    """(width, height) in multiples of `multiple` at which an image is worked on.

    Images of more than `max_area` pixels are made smaller; then each side is cut to a multiple, as
    in the original (ai-forever/Kandinsky-3, utils.py). What is smaller than one multiple is
    enlarged to it, which the original cannot do.

    Raises:
        ValueError: an image too long and thin to be enlarged so.
    """
    factor = max(1.0, (width * height / max_area) ** 0.5)
    sides = [round(side / factor) // multiple * multiple for side in (width, height)]
    if min(sides) > 0:
        return sides[0], sides[1]
    short, long = sorted((width, height))
    if long > MAX_RATIO * short:
        raise ValueError(
            f"the image is {width} x {height} pixels: too long and thin to be worked on at "
            f"multiples of {multiple} pixels; cut it into parts, or give it wider sides."
        )
    scale = multiple / short
    sides = [max(round(side * scale) // multiple, 1) * multiple for side in (width, height)]
    return sides[0], sides[1]
