# SPDX-License-Identifier: Apache-2.0
"""The loss curve of a run as a picture, for people who look; drawn with Pillow alone."""

import math
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from k3jax.images.pngs import write_png
from k3jax.training.metrics import read_metrics
from k3jax.training.run_files import name_in_errors


WIDTH, HEIGHT = 960, 540
LEFT, RIGHT, TOP, BOTTOM = 84, 24, 48, 56  # margins, pixels
RAW, SMOOTH, VALIDATION, NONFINITE = (190, 205, 230), (30, 80, 170), (210, 110, 20), (200, 0, 0)
GRID, INK = (228, 228, 228), (60, 60, 60)


def plot_losses(
    metrics_jsonl: str | os.PathLike, png_path: str | os.PathLike, *, smoothing: float = 0.01
) -> None:
    """Draws the training loss, a smoothed curve over it and the validation loss as dots.

    Steps whose loss was not finite are red lines.

    Args:
        metrics_jsonl: as `MetricWriter` writes it; its `loss` and `validation_loss` are drawn.
        smoothing: share of the curve that an exponential average reaches back over.

    Raises:
        ValueError: the file holds no finite loss.
    """
    records = list(read_metrics(metrics_jsonl))
    train, validation = (_points(records, name) for name in ("loss", "validation_loss"))
    if not len(train):
        raise ValueError(f"{metrics_jsonl} holds no finite loss to draw.")
    smooth = _smoothed(train, max(1.0, smoothing * len(train)))
    values = np.concatenate([train[:, 1], validation[:, 1]])
    # The first steps of a run may lie far above all others, and would flatten the rest.
    high = max(np.percentile(values, 99), smooth[len(smooth) // 10 :, 1].max())
    low = values.min()
    margin = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    plane = _Plane(train[0, 0], max(train[-1, 0], train[0, 0] + 1), low - margin, high + margin)

    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    _draw_axes(draw, font, plane)
    for record in records:
        if "loss" in record and record["loss"] is None:
            x, _ = plane.pixel(record["step"], plane.low)
            draw.line([(x, TOP), (x, HEIGHT - BOTTOM)], fill=NONFINITE)
    _draw_curve(draw, plane, train, RAW, 1)
    _draw_curve(draw, plane, smooth, SMOOTH, 3)
    for step, value in validation:
        x, y = plane.pixel(step, value)
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=VALIDATION)
    _draw_legend(draw, font, train, smooth, validation)
    with name_in_errors(png_path):
        write_png(image, Path(png_path))


class _Plane:
    """Steps and losses -> pixels."""

    def __init__(self, first: float, last: float, low: float, high: float):
        self.first, self.last, self.low, self.high = first, last, low, high

    def pixel(self, step: float, value: float) -> tuple[float, float]:
        across = (step - self.first) / (self.last - self.first)
        up = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        x = LEFT + across * (WIDTH - LEFT - RIGHT)
        return x, HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def _points(records: list[dict], name: str) -> np.ndarray:
    """Finite values of a metric, float64 (n, 2): step, value."""
    pairs = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return np.array(pairs, np.float64).reshape(-1, 2)


def _smoothed(points: np.ndarray, reach: float) -> np.ndarray:
    """Exponential moving average, without the bias of its start."""
    decay, total, weight, smooth = 1 - 1 / reach, 0.0, 0.0, points.copy()
    for row in smooth:
        total, weight = decay * total + row[1], decay * weight + 1
        row[1] = total / weight
    return smooth


def _ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers between two."""
    rough = (high - low) / count
    scale = 10 ** math.floor(math.log10(rough))
    size = next(scale * factor for factor in (1, 2, 5, 10) if scale * factor >= rough)
    first = math.ceil(low / size)
    return [k * size for k in range(first, math.floor(high / size) + 1)]


def _draw_axes(draw: ImageDraw.ImageDraw, font, plane: _Plane) -> None:
    for value in _ticks(plane.low, plane.high):
        _, y = plane.pixel(plane.first, value)
        draw.line([(LEFT, y), (WIDTH - RIGHT, y)], fill=GRID)
        draw.text((LEFT - 8, y), f"{value:.4g}", fill=INK, font=font, anchor="rm")
    for step in _ticks(plane.first, plane.last):
        x, _ = plane.pixel(step, plane.low)
        draw.line([(x, TOP), (x, HEIGHT - BOTTOM)], fill=GRID)
        draw.text((x, HEIGHT - BOTTOM + 8), f"{step:,.10g}", fill=INK, font=font, anchor="mt")
    draw.rectangle([LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM], outline=INK)
    middle = (LEFT + WIDTH - RIGHT) / 2
    draw.text((middle, HEIGHT - 10), "step", fill=INK, font=font, anchor="mb")
    draw.text((12, TOP - 14), "loss", fill=INK, font=font, anchor="lb")


def _draw_curve(draw, plane: _Plane, points: np.ndarray, colour, width: int) -> None:
    pixels = [plane.pixel(step, value) for step, value in points]
    if len(pixels) == 1:
        (x, y), r = pixels[0], width + 1
        draw.ellipse([x - r, y - r, x + r, y + r], fill=colour)
    else:
        draw.line(pixels, fill=colour, width=width, joint="curve")


def _draw_legend(draw, font, train, smooth, validation) -> None:
    entries = [(RAW, "each"), (SMOOTH, f"smoothed, now {smooth[-1, 1]:.4g}")]
    if len(validation):
        entries.append((VALIDATION, f"validation, best {validation[:, 1].min():.4g}"))
    x = LEFT
    for colour, text in entries:
        draw.rectangle([x, 18, x + 18, 30], fill=colour)
        draw.text((x + 26, 24), text, fill=INK, font=font, anchor="lm")
        x += 26 + draw.textlength(text, font=font) + 32
